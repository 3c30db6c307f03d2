"""What a student is taught: a weighted sum of losses, such as `kd[temperature=4]+0.5*feature`.

Losses on logits compare the student with all teachers of a task together. Losses on features and maps compare it with each of them, whose
features are brought to a standard form first, so that none rules by its scale (PHI-S, arXiv:2410.01680), and count each the same.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry
from vtzoo.losses._outputs import Outputs, Shapes

SHOWN = frozenset({"features", "maps"})


@dataclass(frozen=True)
class Term:
    """One loss of a sum.

    Attributes:
        weight: its factor.
        name: of the loss.
        module: its file.
        chosen: all its knobs.
    """

    weight: float
    name: str
    module: ModuleType
    chosen: Mapping[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """Which outputs it looks at."""
        return frozenset(self.module.NEEDS)

    @property
    def facts(self) -> dict[str, Any]:
        """For lineage and keys."""
        return {"function": self.name, **self.chosen} | ({"weight": self.weight} if self.weight != 1 else {})

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        """(student, teacher, labels, **knobs) -> a scalar."""
        return getattr(self.module, self.name.replace("-", "_"))

    def made(self, what: str, *args: Any) -> nn.Module | None:
        """Its bridge or standard form, given those of its knobs that it names; None where it has none."""
        make = getattr(self.module, what, None)
        if make is None:
            return None
        taken = inspect.signature(make).parameters
        return make(*args, **{k: v for k, v in self.chosen.items() if k in taken})


def read(spec: str) -> list[Term]:
    """The terms of a sum.

    Raises:
        UsageError: the grammar, an unknown knob or a wrong value.
        NotFound: no loss is called so.
    """
    terms: list[Term] = []
    for weight, part in knobs.weighted(spec):
        module = registry.load("losses", part.name)
        chosen = knobs.decode(getattr(module, part.name.replace("-", "_")), part.knobs, part.name)
        assert isinstance(chosen, dict)
        terms.append(Term(weight, part.name, module, chosen))
    return terms


def needs_of(terms: Sequence[Term]) -> frozenset[str]:
    """What all of them look at."""
    return frozenset[str]().union(*(t.needs for t in terms))


class Objective(nn.Module):
    """The sum, with what it trains beside the student and has fitted to the teachers.

    Args:
        terms: of the sum.
        student: shapes of its outputs.
        teachers: the same of each teacher, by what it is known by.
        samples: features of each teacher, [n, width], on which standard forms are fitted; none where no term looks at features.
    """

    def __init__(
        self, terms: Sequence[Term], student: Shapes, teachers: Mapping[str, Shapes], samples: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.terms = terms
        self.bridges, self.standards = nn.ModuleDict(), nn.ModuleDict()
        for i, term in enumerate(terms):
            for who, theirs in teachers.items() if term.needs & SHOWN else ():
                form = term.made("standard", samples[who], student.features) if "features" in term.needs else None
                if form is not None:
                    self.standards[f"{i} {who}"] = form.requires_grad_(requires_grad=False)
                    with torch.no_grad():
                        theirs = replace(theirs, features=form(samples[who][:1]).shape[-1])  # noqa: PLW2901 - as it is taught
                bridge = term.made("bridge", student, theirs)
                if bridge is not None:
                    self.bridges[f"{i} {who}"] = bridge

    def forward(self, ours: Outputs, theirs: Sequence[Outputs], labels: Tensor, who: Sequence[str]) -> Tensor:
        """The sum's mean over the images of one task.

        Args:
            ours: what the student gives out.
            theirs: what each teacher answered.
            labels: [n], -1 where there are none; or [n, classes], the classes' shares.
            who: what each teacher is known by.
        """
        total = torch.zeros((), device=labels.device)
        for i, term in enumerate(self.terms):
            pairs = zip(who, theirs, strict=True) if term.needs & SHOWN else [("", theirs[0])]
            losses = [self._one(i, term, ours, answer, labels, name) for name, answer in pairs]
            total = total + term.weight * torch.stack(losses).mean()
        return total

    def _one(self, i: int, term: Term, ours: Outputs, answer: Outputs, labels: Tensor, who: str) -> Tensor:
        key = f"{i} {who}"
        if key in self.standards and answer.features is not None:
            answer = replace(answer, features=self.standards[key](answer.features))
        if key in self.bridges:
            ours = self.bridges[key](ours)
        return term.function(ours, answer, labels, **term.chosen)

"""A network that learns several tasks at once: one trunk, and a classifier for each task.

A classifier is whatever the architecture has there (a linear layer, a convolution, one for each of two tokens). The trunk, and what it has behind its
pooling, sees the whole batch; only the classifiers share it out. One task needs none of this: its classifier stays as it is.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vtzoo.backbone import soften
from vtzoo.by_rows import by_rows
from vtzoo.classifier import head_names
from vtzoo.losses._outputs import Outputs
from vtzoo.outputs import LEVELS, outputs
from vtzoo.tensors import fill


class Heads(nn.Module):
    """The classifiers of all tasks in the place of one; the first `counts[0]` rows are the first task's, and so on.

    Attributes:
        heads: one a task.
        counts: rows of each task.
        only: the one task that answers all rows, if any.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.counts: Sequence[int] = ()
        self.only: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Rows of fewer classes than the most end with zeros."""
        return by_rows(list(self.heads), x, self.counts) if self.only is None else self.heads[self.only](x)


class Pupil(nn.Module):
    """One trunk, and a head for each task.

    Args:
        trunk: a timm network, with the one task's classifier; with any where there are several, which each get a fresh one.
        classes: how many each task has.
    """

    def __init__(self, trunk: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.trunk, self.classes = trunk, tuple(classes)
        self.places = _places(trunk) if len(classes) > 1 else ()
        fresh = [_fresh(trunk, count) for count in classes] if self.places else []
        for place in self.places:
            _put(trunk, place, Heads([model.get_submodule(place) for model in fresh]))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The trunk's, by which its input size is known."""
        return getattr(self.trunk, "pretrained_cfg", {})

    def forward(self, x: Tensor) -> Tensor:
        """The one task's logits, or features; of several tasks the first one's."""
        with self.at(0) as trunk:
            return trunk(x)

    @contextmanager
    def at(self, task: int) -> Generator[nn.Module]:
        """The trunk, in which one task's head answers all rows."""
        heads = [self._heads(place) for place in self.places]
        for own in heads:
            own.only = task
        try:
            yield self.trunk
        finally:
            for own in heads:
                own.only = None

    def classifiers(self, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Each task's classifier by the names that its tensors have in a network with that one alone."""
        return {
            task: {
                f"{p}.{n}": t
                for p in self.places
                for n, t in self._heads(p).heads[i].state_dict(keep_vars=True).items()
            }
            for i, task in enumerate(tasks if self.places else ())
        }

    def begin(self, task: int, tensors: Mapping[str, Tensor]) -> None:
        """Give one task's classifier its first numbers, by the names that `classifiers` gives."""
        fill(self.classifiers([str(i) for i in range(len(self.classes))])[str(task)], tensors)

    @contextmanager
    def bare(self) -> Generator[nn.Module]:
        """The trunk as it is kept: without any head where there are several."""
        heads = {place: self._heads(place) for place in self.places}
        for place in heads:
            _put(self.trunk, place, nn.Identity())
        try:
            yield self.trunk
        finally:
            for place, own in heads.items():
                _put(self.trunk, place, own)

    def answers(self, x: Tensor, counts: Sequence[int], needs: Collection[str], levels: int = LEVELS) -> list[Outputs]:
        """What it gives out for a batch in which the first `counts[0]` images are of the first task, and so on.

        Args:
            x: [batch, 3, h, w], normalised.
            counts: images of each task.
            needs: see `vtzoo.outputs.outputs`.
            levels: how many maps.
        """
        for place in self.places:
            self._heads(place).counts = counts
        found = outputs(self.trunk, x, needs, levels)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        widths = self.classes if self.places else (None,) * len(counts)
        return [
            _rows(found, slice(end - count, end), width) for end, count, width in zip(ends, counts, widths, strict=True)
        ]

    def _heads(self, place: str) -> Heads:
        found = self.trunk.get_submodule(place)
        assert isinstance(found, Heads)
        return found


def _places(trunk: nn.Module) -> tuple[str, ...]:
    """Where its classifiers are; of a list of them each by itself."""
    named = [(name, trunk.get_submodule(name)) for name in head_names(trunk)]
    lists = {n: [f"{n}.{i}" for i in range(len(m))] if isinstance(m, nn.ModuleList) else [n] for n, m in named}
    return tuple(place for places in lists.values() for place in places)


def _fresh(trunk: nn.Module, classes: int) -> nn.Module:
    """A copy of the trunk with a classifier that starts near zero."""
    own: Any = deepcopy(trunk)
    own.reset_classifier(classes)
    soften(own)
    return own


def _put(model: nn.Module, place: str, module: nn.Module) -> None:
    above, _, last = place.rpartition(".")
    model.get_submodule(above)._modules[last] = module  # noqa: SLF001 - setattr would look for a name among buffers and parameters first


def _rows(found: Outputs, part: slice, width: int | None) -> Outputs:
    def cut(value: Tensor | None, width: int | None = None) -> Tensor | None:
        return None if value is None else value[part, :width]

    return Outputs(
        cut(found.logits, width), cut(found.features), tuple(m[part] for m in found.maps), cut(found.token, width)
    )

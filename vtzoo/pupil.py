"""A network that learns several tasks at once: one trunk, and a classifier for each task.

A classifier is whatever the architecture has there (a linear layer, a convolution, one for each of two tokens): it is put in its place while
the task is answered. One task needs none of this: its classifier stays where it is.
"""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vtzoo.anatomy import head_names
from vtzoo.backbone import soften
from vtzoo.losses._outputs import Outputs
from vtzoo.outputs import LEVELS, answered, outputs, through


class Pupil(nn.Module):
    """One trunk, and a head for each task.

    Args:
        trunk: a timm network, with the one task's classifier; with any where there are several, which each get a fresh one.
        classes: how many each task has.
    """

    def __init__(self, trunk: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.places = head_names(trunk) if len(classes) > 1 else ()
        self.heads = nn.ModuleList()
        for count in classes if self.places else ():
            own: Any = deepcopy(trunk)
            own.reset_classifier(count)
            soften(own)
            self.heads.append(nn.ModuleList(own.get_submodule(place) for place in self.places))
        for place in self.places:
            _put(trunk, place, nn.Identity())

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The trunk's, by which its input size is known."""
        return getattr(self.trunk, "pretrained_cfg", {})

    def forward(self, x: Tensor) -> Tensor:
        """The trunk's answer: the one task's logits, or features."""
        return self.trunk(x)

    @contextmanager
    def at(self, task: int) -> Generator[nn.Module]:
        """The trunk with one task's head in place."""
        for place, module in zip(self.places, self._head(task), strict=True):
            _put(self.trunk, place, module)
        try:
            yield self.trunk
        finally:
            for place in self.places:
                _put(self.trunk, place, nn.Identity())

    def _head(self, task: int) -> list[nn.Module]:
        return list(_inner(self.heads[task])) if self.places else []

    def classifiers(self, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Each task's classifier by the names that its tensors have in the trunk."""
        return {
            task: {f"{p}.{n}": t for p, m in zip(self.places, head, strict=True) for n, t in m.state_dict().items()}
            for task, head in zip(tasks, map(_inner, self.heads), strict=True)
        }

    def answers(self, x: Tensor, counts: Sequence[int], needs: Collection[str], levels: int = LEVELS) -> list[Outputs]:
        """What it gives out for a batch in which the first `counts[0]` images are of the first task, and so on.

        Args:
            x: [batch, 3, h, w], normalised.
            counts: images of each task.
            needs: see `vtzoo.outputs.outputs`.
            levels: how many maps.
        """
        if not self.places:
            found = outputs(self.trunk, x, needs, levels)
            return [_rows(found, part) for part in _parts(counts)]
        body, shown = through(self.trunk, x, needs, levels)
        return [self._answer(i, body[part], _rows(shown, part)) for i, part in enumerate(_parts(counts))]

    def _answer(self, task: int, body: Tensor, shown: Outputs) -> Outputs:
        if not len(body):
            return shown
        with self.at(task) as trunk:
            logits, token = answered(trunk, body)
        return Outputs(logits, shown.features, shown.maps, token)


def _inner(head: nn.Module) -> nn.ModuleList:
    assert isinstance(head, nn.ModuleList)
    return head


def _put(model: nn.Module, place: str, module: nn.Module) -> None:
    above, _, last = place.rpartition(".")
    model.get_submodule(above)._modules[last] = module  # noqa: SLF001 - setattr would look for a name among buffers and parameters first


def _parts(counts: Sequence[int]) -> list[slice]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _rows(found: Outputs, part: slice) -> Outputs:
    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[part]

    return Outputs(cut(found.logits), cut(found.features), tuple(m[part] for m in found.maps), cut(found.token))

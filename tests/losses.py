"""Random outputs of two networks, and a loss with what belongs to it."""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry
from vtzoo.losses._outputs import Outputs, Shapes

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Drawn:
    """A batch of both networks' outputs, its labels, and a teacher's features of more images, all in float64."""

    student: Outputs
    teacher: Outputs
    labels: Tensor
    images: Tensor


@dataclass(frozen=True)
class Loss:
    """A loss as a trainer uses it."""

    function: Callable[..., Tensor]
    knobs: dict[str, Any]
    bridge: nn.Module | None
    standard: nn.Module | None

    def __call__(self, drawn: Drawn) -> Tensor:
        """The student's outputs go over the bridge, the teacher's features to their standard form."""
        ours, theirs = drawn.student, drawn.teacher
        if self.bridge is not None:
            ours = self.bridge(ours)
        if self.standard is not None:
            theirs = Outputs(theirs.logits, self.standard(theirs.features), theirs.maps, theirs.token)
        return self.function(ours, theirs, drawn.labels, **self.knobs)


def draw(
    seed: int, *, batch: int = 0, alike: bool = False, width: int = 0, maps: Sequence[tuple[Size, Size]] = ()
) -> Drawn:
    """Shapes and values of this seed; `alike`: the teacher's shapes are the student's, `maps`: (student's, teacher's) shapes."""
    dice, draws = random.Random(seed), torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    n, classes, ours = batch or dice.randint(3, 6), dice.randint(3, 9), dice.randint(3, 6)
    theirs = ours if alike else width or dice.randint(7, 13)
    shapes = list(maps) or _maps(dice)
    if alike:
        shapes = [(s, s) for s, _ in shapes]
    student = Outputs(
        2 * numbers(n, classes), numbers(n, ours), tuple(numbers(n, *s) for s, _ in shapes), 2 * numbers(n, classes)
    )
    mixing = numbers(theirs, theirs)  # so that dimensions are correlated and differ in size
    teacher = Outputs(3 * numbers(n, classes), numbers(n, theirs) @ mixing, tuple(numbers(n, *t) for _, t in shapes))
    labels = torch.randint(classes, (n,), generator=draws)
    return Drawn(student, teacher, labels, numbers(3 * theirs, theirs) @ mixing + 1)


def _maps(dice: random.Random) -> list[tuple[Size, Size]]:
    """Three, from large to small; none is a square."""
    found: list[tuple[Size, Size]] = []
    for side in (8, 5, 2):
        size = [
            dice.choice([(h, w) for h in range(side, side + 3) for w in range(side, side + 3) if h != w])
            for _ in range(2)
        ]
        found.append(((dice.randint(2, 5), *size[0]), (dice.randint(3, 6), *size[1])))
    return found


def shapes(outputs: Outputs) -> Shapes:
    """What a bridge is told of a network."""
    maps = tuple((m.shape[1], m.shape[2], m.shape[3]) for m in outputs.maps)
    return Shapes(0 if outputs.features is None else outputs.features.shape[1], maps)


def load(spec: str, drawn: Drawn, seed: int = 0) -> Loss:
    """A loss with a fresh bridge and a form that was fitted on `drawn.images`, both in float64."""
    part = knobs.one(spec)
    module = registry.load("losses", part.name)
    function = getattr(module, part.name.replace("-", "_"))
    chosen: Any = knobs.decode(function, part.knobs, part.name)
    torch.manual_seed(seed)

    def of(name: str, *args: Any) -> nn.Module | None:
        made = getattr(module, name, None)
        if made is None:
            return None
        return made(*args, **{k: v for k, v in chosen.items() if k in inspect.signature(made).parameters}).double()

    ours, theirs = shapes(drawn.student), shapes(drawn.teacher)
    return Loss(function, chosen, of("bridge", ours, theirs), of("standard", drawn.images, ours.features))


def changed(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Each of the tensors changed."""
    one = [
        None if v is None else tuple(map(change, v)) if isinstance(v, tuple) else change(v) for v in _values(outputs)
    ]
    return Outputs(*one)


def tensors(outputs: Outputs) -> dict[str, Tensor]:
    """By name; maps with their place."""
    found: dict[str, Tensor] = {}
    for field, value in zip(fields(outputs), _values(outputs), strict=True):
        many = isinstance(value, tuple)
        found |= {f"{field.name}.{i}": v for i, v in enumerate(value)} if many else {field.name: value}
    return {name: value for name, value in found.items() if value is not None}


def _values(outputs: Outputs) -> list[Any]:
    return [getattr(outputs, f.name) for f in fields(outputs)]


def learning(outputs: Outputs) -> Outputs:
    """Copies that gather gradients."""
    return changed(outputs, lambda t: t.detach().clone().requires_grad_())


def gradients(value: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    """Of a loss with respect to outputs; those that it doesn't look at are left out."""
    wanted = tensors(outputs)
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}

"""Which tensor of a network each tensor of another one starts from.

A file of this folder has a function of its name, `(source, target, plan, *, knobs)`: the tensors of the network that gives and of the one that takes, by name,
and what is known of both; it gives the new tensors by the target's names, and leaves out what stays as it is. It may have, too,

    EXACT       the values of knobs with which the target must compute what the source does; `vtzoo.initial` tries it
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vtzoo.axes import IN, KERNEL
from vtzoo.errors import ShapeMismatch
from vtzoo.sketch import Sketch

Choice = Callable[[int, int], Sequence[int]]
"""For so many blocks of the source and of the target: which of the source's each of the target's starts from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of both networks.

    Attributes:
        source: the one that gives.
        target: the one that takes.
        classes: for each class of the target's head, its row in the source's; None where it has none there.
        silent: gives the target's parameters that make its blocks add nothing when they are zero, by block: see `vtzoo.silence`.
    """

    source: Sketch
    target: Sketch
    classes: tuple[int | None, ...]
    silent: Callable[[Sequence[str]], Mapping[str, Sequence[str]]]


def kin(plan: Plan, choose: Choice) -> dict[str, str]:
    """The source's block for each of the target's, by name; the nearest with the same layers to the one that is wanted; a block without any is missing.

    Args:
        plan: of both networks.
        choose: which block is wanted.

    Raises:
        ShapeMismatch: the networks have other stages, or other layers in their blocks.
    """
    found: dict[str, str] = {}
    for row, others in stages(plan):
        if not {layers(plan.target, b) for b in row} & {layers(plan.source, b) for b in others}:
            raise unlike(plan, others[-1], row[-1])
        wanted = choose(len(others), len(row))
        pairs = {b: _nearest(plan, b, others, i) for b, i in zip(row, wanted, strict=True)}
        found |= {b: other for b, other in pairs.items() if other}
    return found


def stages(plan: Plan) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The target's blocks of each stage, and the source's.

    Raises:
        ShapeMismatch: there are more stages in one than in the other.
    """
    ours, theirs = plan.target.rows, plan.source.rows
    if len(ours) != len(theirs):
        raise _strangers(plan, f"{len(theirs)} and {len(ours)} stages of blocks")
    return list(zip(ours, theirs, strict=True))


def names(plan: Plan, blocks: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every tensor of the target that has a like in the source, with its name there."""
    inside = {b: f"{b}." for row in plan.target.rows for b in row}
    for name, axes in plan.target.axes.items():
        block = next((b for b, start in inside.items() if name.startswith(start)), "")
        if block and not blocks.get(block):
            continue
        other = blocks[block] + name.removeprefix(block) if block else name
        if len(plan.source.axes.get(other, ())) == len(axes) and other in plan.source.axes:
            yield name, other


def _nearest(plan: Plan, block: str, others: Sequence[str], wanted: int) -> str:
    kind = layers(plan.target, block)
    fitting = [i for i, other in enumerate(others) if layers(plan.source, other) == kind]  # fmt: skip
    return others[min(fitting, key=lambda i: abs(i - wanted))] if fitting else ""


def layers(sketch: Sketch, block: str) -> frozenset[str]:
    """The linear layers and convolutions of a block."""
    inside = f"{block}."
    own = {n: axes for n, axes in sketch.axes.items() if n.startswith(inside)}
    return frozenset(n.removeprefix(inside) for n, axes in own.items() if any(a.kind in (IN, KERNEL) for a in axes))


def unlike(plan: Plan, theirs: str, ours: str) -> ShapeMismatch:
    """A refusal of two blocks with other layers."""
    odd = sorted(layers(plan.target, ours) ^ layers(plan.source, theirs))
    if not odd:
        return _strangers(plan, f"the blocks around {theirs} and {ours} are in another order")
    return _strangers(plan, f"only one of {theirs} and {ours} has {', '.join(odd[:3])}")


def _strangers(plan: Plan, seen: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"a {plan.target.name} can't start from this {plan.source.name}: {seen}",
        "take a source of the student's family, or leave --init out",
    )


def evenly(many: int, few: int) -> list[int]:
    """So few of many indices, at one distance where that divides (Xu et al. 2023)."""
    if many % few == 0:
        return list(range(0, many, many // few))
    return torch.linspace(0, many - 1, few).round().long().tolist()


def spread(few: int, many: int) -> list[int]:
    """Many indices over few things, copies beside each other and as equal in number as can be."""
    return [i * few // many for i in range(many)]

"""What can't be merged, and why: told from headers, before a tensor is read; values that must be equal come last."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vtzoo.delta import BASE, Delta, Part
from vtzoo.errors import Conflict, Corrupt, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.folding import Folded
from vtzoo.rebuilt import rebuild_shared, skeleton
from vtzoo.spec import BackboneCard
from vtzoo.speech import TEXT
from vtzoo.tensors import dtype_of, shape_of


def label(index: int, delta: Delta) -> str:
    """What to call a delta in a message: its place in the user's order, and its tasks."""
    return f"delta {index + 1} ({', '.join(t.name for t in delta.tasks) or delta.method})"


def weights_of(coef: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight per delta, not all of them zero.

    Raises:
        UsageError: anything else.
    """
    if not count:
        raise UsageError("nothing to merge", "name at least one delta")
    weights = (1.0,) * count if coef is None else tuple(float(c) for c in coef)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} coefficients for {count} deltas", "give one per delta, in the same order")
    if not all(math.isfinite(w) for w in weights) or not any(weights):
        said = ", ".join(f"{w:g}" for w in weights)
        raise UsageError(f"the coefficients {said} can't weigh anything", "give finite numbers, not all 0")
    return weights


def refuse_negative(weights: Sequence[float], why: str) -> None:
    """Refuse weights below zero.

    Raises:
        UsageError: one is; `why` says what they would do.
    """
    if min(weights) < 0:
        said = ", ".join(f"{w:g}" for w in weights)
        raise UsageError(f"the coefficients {said} {why}", "use positive ones, or task-arithmetic")


def same_backbone(deltas: Sequence[Delta]) -> None:
    """Same weights, same input size, same names and shapes of resized tensors.

    Raises:
        WrongBackbone: the fingerprints differ, or there is none.
        ShapeMismatch: the deltas were made for different input sizes.
    """
    first, sizes = deltas[0], dict[tuple[int, ...], str]()
    for i, delta in enumerate(deltas):
        who, card = label(i, delta), delta.backbone
        if not card.fingerprint or card.fingerprint != first.backbone.fingerprint:
            made = f"{who} was made for {_named(card)}, {label(0, first)} for {_named(first.backbone)}"
            raise WrongBackbone(made, "merge deltas of one backbone")
        sizes |= {t.preprocess.input_size: who for t in delta.tasks}
        if len(sizes) > 1:
            seen = ", ".join(f"{'x'.join(map(str, s[1:]))} px ({w})" for s, w in sizes.items())
            raise ShapeMismatch(f"the deltas were made for different input sizes: {seen}", "train them at one size")
        differ = sorted(set(_resized(delta).items()) ^ set(_resized(first).items()))
        if differ:
            name = differ[0][0].removeprefix(BASE)
            raise ShapeMismatch(f"{who} and {label(0, first)} resize {name} differently", "train them at one size")


def complete(delta: Delta, who: str, ground: Folded) -> None:
    """What `told` says, and what the grafts act on is in the base.

    Raises:
        ShapeMismatch: the first that isn't, or is left over.
        Corrupt: the header garbles where a graft sits.
    """
    told(delta, who)
    there = {n: ground.shape(n) for n in ground.base}
    for part in delta.parts:
        for site in (s for s in part.sites if not s.name.startswith(TEXT)):
            for name, shape in site.facts.get("params", {}).items():
                _fits(there, site.key(name), shape, f"the base of {who}")
            if site.kind in ("linear", "conv", "norm"):
                _fits(there, site.key("weight"), site.shape, f"the base of {who}")


def told(delta: Delta, who: str) -> None:
    """Every tensor of every graft is there in the shape that the header tells, and none is left over; nothing is built for it.

    Raises:
        ShapeMismatch: the first that isn't, or is.
        Corrupt: the header garbles where a graft sits.
    """
    own = {n: shape_of(delta.tensors, n) for n in delta.tensors}
    wanted = {name: shape for part in delta.parts for name, shape in _wanted(part, who)}
    for name, shape in wanted.items():
        _fits(own, name, shape, who)
    if spare := sorted(n for n in own if n not in wanted and not n.startswith("@")):
        raise ShapeMismatch(f"{who} holds {spare[0]}, which none of its parts knows", "is the file from this version?")


def _wanted(part: Part, who: str) -> Iterator[tuple[str, Sequence[int]]]:
    """The tensors of a part's grafts and their shapes, by its header."""
    try:
        common = rebuild_shared(part)(None)
        yield from ((f"{part.graft}.{n}", t.shape) for n, t in (common.pack() if common else {}).items())
        for site in part.sites:
            pack = skeleton(part.module, site, part.config).pack()
            yield from ((f"{site.key(part.graft)}.{n}", t.shape) for n, t in pack.items())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        said = f"{who}: its header garbles where {part.method} sits ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
        raise Corrupt(said, "make the delta again, or fetch it again") from error


def equal_values(deltas: Sequence[Delta]) -> None:
    """What two deltas hold under one name is the same: heads of tasks of one name, and resized tensors but for their precision.

    Raises:
        Conflict: two different heads for one task.
        ShapeMismatch: two different resizings.
    """
    seen: dict[str, tuple[str, Delta]] = {}
    first = next(i for i, d in enumerate(deltas) if d is sharpest(deltas))
    for i, delta in enumerate(deltas):
        who = label(i, delta)
        for task in delta.tasks:
            before, other = seen.setdefault(task.name, (who, delta))
            if other is delta:
                continue
            if other.task(task.name) != task or not _equal(other.head(task.name), delta.head(task.name)):
                raise Conflict(
                    f"{before} and {who} have different heads for a task named '{task.name}'",
                    f"rename one's task: vtzoo mv REF NEW --task {task.name}={task.name}-2",
                )
        if i != first and not _equal(delta.overrides, deltas[first].overrides, rounded=True):
            said = f"{who} and {label(first, deltas[first])} hold different resized tensors of one backbone"
            raise ShapeMismatch(said, "train them with one version of vtzoo")


def _fits(shapes: Mapping[str, tuple[int, ...]], name: str, wanted: Sequence[int], who: str) -> None:
    seen = shapes.get(name)
    if seen is None or list(seen) != list(wanted):
        found = "is missing" if seen is None else f"has shape {list(seen)}"
        raise ShapeMismatch(f"{who}: {name} {found} where {list(wanted)} is wanted", "is the file complete?")


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, rounded: bool = False) -> bool:
    """Whether all values are the same; where rounded, as the one of lower precision has them."""
    if sorted(a) != sorted(b):
        return False
    common = (lambda x, y: min(x, y, key=_precision)) if rounded else torch.promote_types
    kinds = {n: common(a[n].dtype, b[n].dtype) for n in a}
    return all(torch.equal(a[n].to(k), b[n].to(k)) for n, k in kinds.items())


def sharpest(deltas: Sequence[Delta]) -> Delta:
    """The first whose resized tensors have the highest precision."""
    return max(deltas, key=lambda d: min((_precision(dtype_of(d.tensors, BASE + n)) for n in d.overrides), default=0))


def _precision(dtype: torch.dtype) -> int:
    """Bits that tell one value from another."""
    return -round(math.log2(torch.finfo(dtype).eps)) if dtype.is_floating_point else 0


def _resized(delta: Delta) -> dict[str, tuple[int, ...]]:
    return {n: shape_of(delta.tensors, n) for n in delta.tensors if n.startswith(BASE)}


def _named(card: BackboneCard) -> str:
    return f"{card.name or card.arch} ({card.fingerprint[:19] + '…' if card.fingerprint else 'no fingerprint'})"

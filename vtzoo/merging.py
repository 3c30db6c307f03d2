"""Merge: many deltas of one backbone into one. Plan first, then stream tensor by tensor.

Each delta, whatever its method, becomes a lazy task vector (folded minus base). The plan refuses what can't be merged
before a tensor is read; the result's tensors are recipes: asked for (by `Delta.save`, say), one reads its few inputs,
runs the algorithm in float32 and gives base + merged. Nothing is kept. Heads travel beside the merge, one per task.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from vtzoo import __version__, knobs, registry
from vtzoo.anatomy import Site
from vtzoo.delta import BASE, HEAD, Delta, Part
from vtzoo.errors import Conflict, NotFoldable, ShapeMismatch, UsageError, WrongBackbone, did_you_mean
from vtzoo.folding import Folded, grounded, rebuild, task_vector
from vtzoo.merges._whole import Vectors, Whole
from vtzoo.tensors import Lazy, shape_of, working

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that has been checked.

    Attributes:
        deltas: in the user's order.
        spec: the algorithm as written.
        coef: one weight per delta.
        layers: factors by tensor name, as written.
        whole: the task vectors.
        ground: the backbone's tensors at the deltas' input size.
        algorithm: gives one merged tensor.
        factors: of the tensors whose merged value is scaled.
    """

    deltas: tuple[Delta, ...]
    spec: str
    coef: tuple[float, ...]
    layers: str
    whole: Whole
    ground: Folded
    algorithm: Callable[[Vectors], Tensor]
    factors: Mapping[str, float]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged backbone: base + factor * algorithm(task vectors)."""
        with torch.no_grad():
            merged, base = self.algorithm(self.whole.at(name)), self.ground[name]
            kind = working(base, merged)
            factor = self.factors.get(name, 1.0)
            return base.to(kind) + (merged if factor == 1 else merged.mul_(factor)).to(kind)


def merge(
    deltas: Sequence[Delta],
    method: str,
    *,
    base: Mapping[str, Tensor],
    coef: Sequence[float] | None = None,
    layers: str | None = None,
    parents: Sequence[str] = (),
) -> Delta:
    """Merge deltas of one backbone into one of method `full`, with every task's head.

    Args:
        deltas: of one backbone and one input size; their methods may differ, each must fold.
        method: an algorithm with its knobs, such as "ties[density=0.2]".
        base: the backbone's tensors, timm-named; may be lazy.
        coef: one weight per delta, all 1 by default; what they mean is the algorithm's.
        layers: factors on the merged task vector by tensor name, such as "blocks.0-5:0.3"; see `factors_of`.
        parents: digests of the deltas, for the lineage.

    Returns:
        A lazy delta; saving it streams into the file.

    Raises:
        UsageError: unknown or wrong knobs, coefficients or layers.
        WrongBackbone: the deltas have different backbones.
        ShapeMismatch: different input sizes, or tensors that don't fit the base.
        NotFoldable: a delta has no task vector, or its head can't travel.
        Conflict: two deltas have different heads for a task of the same name.
    """
    return merged(plan(deltas, method, base=base, coef=coef, layers=layers), parents)


def plan(
    deltas: Sequence[Delta], method: str, *, base: Mapping[str, Tensor], coef: Sequence[float] | None = None, layers: str | None = None
) -> Plan:  # fmt: skip
    """Check everything that `merge` refuses; see there. Tensors are read last, and only to compare what must be equal."""
    deltas, part = tuple(deltas), knobs.one(method)
    module = registry.load("merges", part.name)
    function = getattr(module, part.name.replace("-", "_"))
    chosen: Any = knobs.decode(function, part.knobs, part.name)
    weights = _weights(coef, len(deltas), getattr(module, "check", None))
    _same_backbone(deltas)
    base = _Latest(base)
    for i, delta in enumerate(deltas):
        _complete(delta, _label(i, delta), grounded(base, delta))
    _head_parts(deltas)
    sources, ground = [task_vector(base, d) for d in deltas], grounded(base, deltas[0])
    names = sorted({n for s in sources for n in s})
    whole = Whole(
        sources, weights, {n: ground.shape(n) for n in names},
        order=_order(deltas) if module.SYMMETRIC else (), labels=[_label(i, d) for i, d in enumerate(deltas)],
    )  # fmt: skip
    factors = factors_of(layers, names)
    _equal_values(deltas)
    return Plan(
        deltas=deltas, spec=method, coef=weights, layers=layers or "", whole=whole, ground=ground,
        algorithm=lambda vectors: function(vectors, **chosen), factors=factors,
    )  # fmt: skip


def merged(plan: Plan, parents: Sequence[str] = ()) -> Delta:
    """The delta of a plan."""
    shapes, sites = plan.whole.shapes, _sites(plan.whole.shapes)
    makers: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        for param in site.facts["params"]:
            name, place = site.key(param), f"{site.key(FULL)}.{param}"
            makers[place], sizes[place] = (lambda n=name: plan.tensor(n)), shapes[name]
    for delta in reversed(plan.deltas):  # what two of them hold is equal
        for name in delta.tensors:
            if name.startswith((HEAD, BASE)):
                makers[name], sizes[name] = (lambda d=delta, n=name: d.tensors[n]), shape_of(delta.tensors, name)
    tasks = {t.name: t for d in plan.deltas for t in d.tasks}
    lineage = {
        "verb": "merge", "parents": list(parents), "spec": plan.spec, "coef": list(plan.coef), "layers": plan.layers,
        "versions": {"vtzoo": __version__, "torch": torch.__version__},
    }  # fmt: skip
    part = Part(method=FULL, graft=FULL, knobs={}, sites=tuple(sites))
    return Delta(
        method=plan.spec, parts=(part, *_head_parts(plan.deltas)), backbone=plan.deltas[0].backbone,
        tensors=Lazy(makers, sizes), tasks=tuple(tasks.values()), lineage=lineage,
    )  # fmt: skip


def renamed(delta: Delta, old: str, new: str) -> Delta:
    """The same delta with another name for one of its tasks.

    Raises:
        NotFound: it has no such task.
        Conflict: it has a task of the new name.
    """
    delta.task(old)
    if any(t.name == new for t in delta.tasks):
        raise Conflict(f"this delta has a task '{new}' already", "choose another name")
    before, after = f"{HEAD}{old}/", f"{HEAD}{new}/"
    names = {(after + n.removeprefix(before) if n.startswith(before) else n): n for n in delta.tensors}
    tensors = Lazy({k: (lambda n=n: delta.tensors[n]) for k, n in names.items()}, {k: shape_of(delta.tensors, n) for k, n in names.items()})
    tasks = tuple(Task(name=new, classes=t.classes, preprocess=t.preprocess) if t.name == old else t for t in delta.tasks)
    return delta.with_(tensors=tensors, tasks=tasks)


def factors_of(layers: str | None, names: Sequence[str]) -> dict[str, float]:
    """Read factors by tensor name: "blocks.0-5:0.3,*norm*:0".

    A pattern stands for the beginning of a name, part by part between dots; a part may be a range of numbers (0-5) or
    hold `*` and `?`. A pattern with `*` also matches whole names. The last that matches a name decides.

    Raises:
        UsageError: not PATTERN:NUMBER, or a pattern that matches none of the names.
    """
    found: dict[str, float] = {}
    for item in layers.split(",") if layers is not None else ():
        pattern, colon, number = item.strip().rpartition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not colon or not pattern or not math.isfinite(factor):
            raise UsageError(f"'{item}' is not PATTERN:NUMBER", "for example --layers blocks.0-5:0.3,blocks.6-11:1")
        hits = [n for n in names if _matches(pattern, n)]
        if not hits:
            raise UsageError(f"'{pattern}' matches no tensor that these deltas touch", did_you_mean(pattern, {p for n in names for p in _starts(n)}))
        found.update(dict.fromkeys(hits, factor))
    return found


class _Latest(Mapping[str, Tensor]):
    """A mapping that remembers the last tensor it gave: all task vectors of one name start from it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._last = tensors, ("", torch.empty(0))

    def __getitem__(self, name: str) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._tensors[name])
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._tensors, name)

"""Merge: many deltas of one backbone into one. Plan first, then stream tensor by tensor.

Each delta, whatever its method, becomes a lazy task vector (folded minus base). The plan refuses what can't be merged
before a tensor is read; the result's tensors are recipes: asked for (by `Delta.save`, say), one reads its few inputs,
runs the algorithm in float32 and gives base + merged. Nothing is kept. Heads travel beside the merge, one per task.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vtzoo import __version__
from vtzoo.anatomy import Site
from vtzoo.delta import BASE, HEAD, Delta, Part
from vtzoo.errors import Conflict, NotFoldable, UsageError
from vtzoo.folding import Folded, check_base, grounded, task_vector
from vtzoo.merges._chain import Step, algorithm, checks, steps, written
from vtzoo.merges._chain import evidence as needed
from vtzoo.merges._checks import complete, equal_values, label, same_backbone, weights_of
from vtzoo.merges._layers import factors_of
from vtzoo.merges._whole import Whole, square_of
from vtzoo.tensors import WORKERS, Lazy, dtype_of, one_thread, shape_of, working
from vtzoo.tied import further, tied

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that has been checked.

    Attributes:
        deltas: in the user's order.
        spec: the algorithm as written, or with the merge that it implies.
        coef: one weight per delta.
        layers: factors by tensor name, as written.
        whole: the task vectors.
        ground: the backbone's tensors at the deltas' input size.
        algorithm: gives one tensor of the merged task vector by its name.
        factors: of the tensors whose merged value is scaled.
        statistics: tensors that are running statistics of a norm, not weights.
        squares: the squared L2 norm of every merged tensor that was computed.
    """

    deltas: tuple[Delta, ...]
    spec: str
    coef: tuple[float, ...]
    layers: str
    whole: Whole
    ground: Folded
    algorithm: Callable[[str], Tensor]
    factors: Mapping[str, float]
    statistics: frozenset[str]
    squares: dict[str, float] = field(default_factory=dict[str, float])

    @torch.no_grad()
    @one_thread()
    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged backbone: base + factor * algorithm(task vectors).

        Running statistics are no directions in weight space, and a variance must not turn negative: whatever the
        algorithm, they become the mean over the tasks by size of weight, and a factor stays within [0, 1].

        Computed in one thread, since more would round matrix products differently; `Delta.save` computes several tensors
        at once.
        """
        factor = self.factors.get(name, 1.0)
        if name in self.statistics:
            total = sum(abs(w) for w in self.coef)
            merged = self.whole.at(name).sum([abs(w) / total for w in self.coef])
            factor = min(max(factor, 0.0), 1.0)
        else:
            merged = self.algorithm(name)
        if factor != 1:
            merged = merged.mul_(factor)
        square = self.squares[name] = square_of(merged)
        if not math.isfinite(square) and not bool(merged.isfinite().all()):
            raise UsageError(f"{self.spec} makes {name} infinite", "give smaller coefficients, --layers or scale")
        base = self.ground[name]
        kind = working(base, merged)
        return base.to(kind) + merged.to(kind)


def merge(
    deltas: Sequence[Delta],
    method: str,
    *,
    base: Mapping[str, Tensor],
    coef: Sequence[float] | None = None,
    layers: str | None = None,
    evidence: Sequence[Mapping[str, Tensor]] | None = None,
    parents: Sequence[str] = (),
    check: bool = True,
) -> Delta:
    """Merge deltas of one backbone into one of method `full`, with every task's head.

    Args:
        deltas: of one backbone and one input size; their methods may differ, each must fold.
        method: an algorithm with its knobs, alone or with steps around it: "ties[density=0.2]", "dare+ties+svc".
        base: the backbone's tensors, timm-named; may be lazy.
        coef: one weight per delta, all 1 by default; what they mean is the algorithm's.
        layers: factors on the merged task vector by tensor name, such as "blocks.0-5:0.3" (see `factors_of`).
        evidence: what each task's images tell, by name of tensor, where the algorithm needs it: what the functions of
            `vtzoo.evidence` give for each delta, folded.
        parents: digests of the deltas, for the lineage.
        check: compare the base's fingerprint with the deltas', which reads the whole base.

    Returns:
        A lazy delta; saving it streams into the file.

    Raises:
        NotFound: no algorithm of that name.
        UsageError: unknown or wrong knobs, coefficients or layers.
        WrongBackbone: the deltas have different backbones, or the base holds other weights.
        ShapeMismatch: different input sizes, or tensors that don't fit the base.
        NotFoldable: a delta has no task vector, or heads of different kinds would have to share one delta.
        Conflict: two deltas have different heads for a task of the same name.
    """
    made = plan(deltas, method, base=base, coef=coef, layers=layers, evidence=evidence)
    if check:
        check_base(base, made.deltas[0])
    return assembled(made, parents)


def plan(
    deltas: Sequence[Delta],
    method: str,
    *,
    base: Mapping[str, Tensor],
    coef: Sequence[float] | None = None,
    layers: str | None = None,
    evidence: Sequence[Mapping[str, Tensor]] | None = None,
) -> Plan:
    """Refuse what `merge` refuses (see there); tensors are read last, and only those that two deltas must share."""
    deltas, chain = tuple(deltas), steps(method)
    weights = weights_of(coef, len(deltas))
    checks(chain, weights)
    _check_evidence(chain, evidence, len(deltas))
    same_backbone(deltas)
    _head_parts(deltas)
    base, labels = _Latest(base), [label(i, d) for i, d in enumerate(deltas)]
    for delta, who in zip(deltas, labels, strict=True):
        complete(delta, who, grounded(base, delta))
    vectors, ground = [task_vector(base, d) for d in deltas], grounded(base, deltas[0])
    shapes = {n: ground.shape(n) for n in sorted({n for v in vectors for n in v})}
    factors, statistics = factors_of(layers, list(shapes)), _statistics(deltas)
    equal_values(deltas)
    whole = Whole(
        vectors, weights, shapes, labels=labels, keys=_keys(deltas), aside=statistics, ground=ground,
        evidence=evidence or (), order=_order(deltas) if all(s.module.SYMMETRIC for s in chain) else (),
    )  # fmt: skip
    return Plan(
        deltas=deltas,
        spec=written(chain),
        coef=weights,
        layers=layers or "",
        whole=whole,
        ground=ground,
        algorithm=algorithm(chain, whole),
        factors=factors,
        statistics=statistics,
    )


def assembled(plan: Plan, parents: Sequence[str] = (), looked_at: Sequence[Mapping[str, Any]] = ()) -> Delta:
    """The merged delta of a plan, lazily: replacement tensors, every head, the resized tensors.

    Args:
        plan: of `plan`.
        parents: digests of the deltas, for the lineage.
        looked_at: which images of each task, for the lineage.
    """
    others = {n: more for d in plan.deltas for p in d.parts for n, more in further(p.sites).items()}
    sites = tied(_sites(plan.whole.shapes, plan.statistics), others)
    makers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for site in sites:
        for param in (*site.facts["params"], *site.facts.get("buffers", ())):
            place, name = f"{site.key(FULL)}.{param}", site.key(param)
            makers[place], shapes[place] = (lambda n=name: plan.tensor(n)), plan.whole.shapes[name]
            dtypes[place] = torch.float64 if dtype_of(plan.ground, name) == torch.float64 else torch.float32
    for delta in plan.deltas:
        for name in delta.tensors:
            if name.startswith((HEAD, BASE)) and name not in makers:
                makers[name], shapes[name] = (lambda d=delta, n=name: d.tensors[n]), shape_of(delta.tensors, name)
    return Delta(
        method=plan.spec,
        parts=(Part(method=FULL, graft=FULL, sites=sites), *_head_parts(plan.deltas)),
        backbone=plan.deltas[0].backbone,
        tensors=Lazy(makers, shapes, dtypes),
        tasks=tuple({t.name: t for d in plan.deltas for t in d.tasks}.values()),
        lineage={
            "verb": "merge",
            "parents": list(parents),
            "spec": plan.spec,
            "coef": list(plan.coef),
            "layers": plan.layers,
            **({"images": [dict(i) for i in looked_at]} if looked_at else {}),
            "versions": {"vtzoo": __version__, "torch": torch.__version__},
        },
    )


def renamed(delta: Delta, old: str, new: str) -> Delta:
    """The same delta with another name for one of its tasks.

    Raises:
        NotFound: it has no such task.
        Conflict: it has a task of the new name.
    """
    task = delta.task(old)
    if any(t.name == new for t in delta.tasks):
        raise Conflict(f"this delta has a task '{new}' already", "choose another name")
    own, moved = delta.tensors, {f"{HEAD}{old}/{n}": f"{HEAD}{new}/{n}" for n in delta.head(old)}
    names = {moved.get(n, n): n for n in own}
    tensors = Lazy({k: (lambda n=n: own[n]) for k, n in names.items()}, {k: shape_of(own, n) for k, n in names.items()})
    tasks = tuple(replace(t, name=new) if t is task else t for t in delta.tasks)
    return delta.with_(tensors=tensors, tasks=tasks)


class _Latest(Lazy):
    """A mapping that remembers the last tensors it gave, one per worker: all task vectors of one name start from it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({n: (lambda n=n: tensors[n]) for n in tensors}, {})
        self._tensors, self._get = tensors, lru_cache(maxsize=WORKERS)(tensors.__getitem__)

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, likewise."""
        return dtype_of(self._tensors, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from what lies underneath."""
        return shape_of(self._tensors, name)


def _check_evidence(chain: Sequence[Step], evidence: Sequence[Mapping[str, Tensor]] | None, count: int) -> None:
    """Refuse to start without what the algorithm looks at.

    Raises:
        UsageError: it is missing, or not one a delta.
    """
    wanted = needed(chain)
    if wanted and (evidence is None or len(evidence) != count):
        name = next(s.part.name for s in chain if s.evidence)
        raise UsageError(
            f"{name} needs images of every task: {len(evidence or ())} given for {count} deltas",
            "give --data once per delta, in the same order, as: --data vtzoo:fashion --data ./birds",
        )


def _head_parts(deltas: Sequence[Delta]) -> tuple[Part, ...]:
    """The methods that build the heads: one choice for all tasks, since a delta says it once.

    Raises:
        NotFoldable: the deltas differ in it.
    """
    kinds = [tuple(p for p in d.parts if hasattr(p.module, "head")) for d in deltas if d.tasks]
    if len({json.dumps([[p.method, p.json()["knobs"]] for p in k], sort_keys=True) for k in kinds}) > 1:
        names = " and ".join(sorted({"+".join(p.method for p in k) or "linear" for k in kinds}))
        raise NotFoldable(f"the deltas have heads of different kinds: {names}", "train them with the same kind of head")
    return kinds[0] if kinds else ()


def _order(deltas: Sequence[Delta]) -> list[int]:
    """An order that isn't the user's, so that a symmetric merge gives the same bits whatever order that is."""
    return sorted(range(len(deltas)), key=lambda i: json.dumps(deltas[i].header(), sort_keys=True))


def _keys(deltas: Sequence[Delta]) -> list[str]:
    """Each delta's tasks, and a number where several have the same: what tells task vectors apart in any order."""
    names = [",".join(t.name for t in d.tasks) or d.method for d in deltas]
    found, seen = dict[int, str](), Counter[str]()
    for i in _order(deltas):
        found[i] = f"{names[i]}#{seen[names[i]]}"
        seen[names[i]] += 1
    return [found[i] for i in range(len(deltas))]


def _statistics(deltas: Sequence[Delta]) -> frozenset[str]:
    """The running statistics that any delta brings, by full name."""
    sites = [s for d in deltas for part in d.parts for s in part.sites]
    return frozenset(s.key(name) for s in sites for name in s.facts.get("buffers", ()))


def _sites(shapes: Mapping[str, tuple[int, ...]], statistics: frozenset[str]) -> list[Site]:
    """Parameters and running statistics gathered by the module that owns them."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in sorted(shapes):
        module, _, param = name.rpartition(".")
        facts = found.setdefault(module, {"params": {}})
        facts.setdefault("buffers" if name in statistics else "params", {})[param] = list(shapes[name])
    return [Site(name=module, kind="params", facts=facts) for module, facts in found.items()]

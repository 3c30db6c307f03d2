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
from typing import Any

import torch
from torch import Tensor

from vtzoo.anatomy import Site
from vtzoo.delta import BASE, HEAD, Delta, Part, head_parts
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.folding import Folded, check_base, grounded, task_vector, with_plain_heads
from vtzoo.keeping import Kept
from vtzoo.lineage import record
from vtzoo.masks import MASK, SCALE, packed
from vtzoo.merges._chain import Step, algorithm, checks, correcting, curious, steps, written
from vtzoo.merges._checks import complete, equal_values, label, same_backbone, sharpest, weights_of
from vtzoo.merges._layers import factors_of
from vtzoo.merges._scene import Scene
from vtzoo.merges._whole import BLOCK, Whole, spans_of, square_of
from vtzoo.tensors import Latest, Lazy, dtype_of, one_thread, pieces_of, shape_of, working
from vtzoo.tied import further, tied

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that has been checked.

    Attributes:
        deltas: in the user's order.
        chain: the algorithm's steps, the merge that they imply among them.
        coef: one weight per delta.
        layers: factors by tensor name, as written.
        whole: the task vectors.
        ground: the backbone's tensors at the deltas' input size.
        algorithm: gives one tensor of the merged task vector by its name.
        factors: of the tensors whose merged value is scaled.
        statistics: tensors that are running statistics of a norm, not weights.
        squares: the squared L2 norm of every merged tensor that was computed.
        searched: how coefficients were found, for the lineage.
    """

    deltas: tuple[Delta, ...]
    chain: tuple[Step, ...]
    coef: tuple[float, ...]
    layers: str
    whole: Whole
    ground: Folded
    algorithm: Callable[[str], Tensor]
    factors: Mapping[str, float]
    statistics: frozenset[str]
    squares: dict[str, float] = field(default_factory=dict[str, float])
    searched: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def spec(self) -> str:
        """The algorithm as written, with the merge that it implies."""
        return written(self.chain)

    @property
    def masking(self) -> Step | None:
        """The step that gives each task a mask, where one does."""
        return next((s for s in self.chain if s.masks), None)

    @torch.no_grad()
    @one_thread()
    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged backbone: base + factor * algorithm(task vectors).

        Running statistics are no directions in weight space, and a variance must not turn negative: whatever the
        algorithm, they become the mean over the tasks by size of weight, and a factor stays within [0, 1].

        Computed in one thread, since more would round matrix products differently; `Delta.save` computes several tensors
        at once.
        """
        merged, piece = self.vector(name), pieces_of(self.ground, name)
        kind = torch.float64 if dtype_of(self.ground, name) == torch.float64 else working(merged)
        found = merged.to(kind).contiguous()
        if piece is None:
            return found.add_(self.ground[name].to(kind))
        flat = found.view(-1)  # the base is read in pieces, into memory that is still at hand
        for start, stop in spans_of(flat.numel(), BLOCK):
            flat[start:stop].add_(piece(start, stop).to(kind))
        return found

    def vector(self, name: str) -> Tensor:
        """One tensor of the merged task vector, scaled as `--layers` says, in float32."""
        factor = self.factors.get(name, 1.0)
        if name in self.statistics:
            shares = self._shares(name)
            merged = self.whole.at(name).sum([s / sum(shares) for s in shares])
            factor = min(max(factor, 0.0), 1.0)
        else:
            merged = self.algorithm(name)
        merged = merged if factor == 1 else merged.mul_(factor)
        square = self.squares[name] = square_of(merged)
        if not math.isfinite(square) and not bool(merged.isfinite().all()):
            raise UsageError(f"{self.spec} makes {name} infinite", "give smaller coefficients, --layers or scale")
        return merged

    def _shares(self, name: str) -> list[float]:
        """How much each task counts in a running statistic: its weight's size, and what a look at images gave it."""
        own = [abs(w) for w in self.coef]
        for task, told in enumerate(self.whole.evidence):
            found = told.get(name) if isinstance(told, dict) else None
            own[task] *= 1.0 if found is None or found.ndim else float(found)
        return own if any(own) else [abs(w) for w in self.coef]

    @torch.no_grad()
    @one_thread()
    def masks(self, name: str) -> Tensor:
        """Each task's bits for one tensor, packed: see `vtzoo.masks`."""
        step, merged = self.masking, self.algorithm(name)
        assert step is not None
        rows = torch.zeros(len(self.deltas), -(-merged.numel() // 8), dtype=torch.uint8)
        for vector in self.whole.at(name):
            rows[vector.task] = packed(step.module.mask(vector, merged, **step.knobs))
        return rows

    @torch.no_grad()
    @one_thread()
    def scales(self) -> Tensor:
        """What each task's own network multiplies the merged task vector with, [tasks]."""
        step, own, kept = self.masking, *torch.zeros(2, len(self.deltas), dtype=torch.float64)
        assert step is not None
        if not getattr(step.module, "RESCALES", False):
            return torch.ones(len(self.deltas))
        for name in self.maskable:
            merged = self.algorithm(name)
            for vector in self.whole.at(name):
                own[vector.task] += (vector.value * vector.weight).abs().sum(dtype=torch.float64)
                kept[vector.task] += (
                    (merged * step.module.mask(vector, merged, **step.knobs)).abs().sum(dtype=torch.float64)
                )
        return torch.where(kept > 0, own / kept, 1.0).float()

    @property
    def maskable(self) -> list[str]:
        """The tensors that have masks: all but running statistics."""
        return sorted(set(self.whole.shapes) - self.statistics)


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
    if (step := correcting(made.chain)) is not None:
        rest = written([s for s in made.chain if s is not step])
        raise UsageError(f"{step.part.name} corrects heads by images, which `vtzoo merge` looks at", f"merge by {rest}")
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
    deltas, chain = tuple(map(with_plain_heads, deltas)), steps(method)
    weights = weights_of(coef, len(deltas))
    checks(chain, weights)
    _check_masks(chain, deltas)
    _check_evidence(chain, evidence, len(deltas))
    same_backbone(deltas)
    _head_parts(deltas)
    base, labels = Latest(base), [label(i, d) for i, d in enumerate(deltas)]
    for delta, who in zip(deltas, labels, strict=True):
        complete(delta, who, grounded(base, delta))
    vectors, ground = [task_vector(base, d) for d in deltas], grounded(base, sharpest(deltas))
    shapes = {n: ground.shape(n) for n in sorted({n for v in vectors for n in v})}
    factors, statistics = factors_of(layers, list(shapes)), _statistics(deltas)
    equal_values(deltas)
    order = _order(deltas)
    whole = Whole(
        vectors, weights, shapes, labels=labels, keys=_keys(deltas, order), aside=statistics, ground=ground,
        evidence=evidence or (), order=order if all(s.module.SYMMETRIC for s in chain) else (),
    )  # fmt: skip
    return Plan(
        deltas=deltas,
        chain=chain,
        coef=weights,
        layers=layers or "",
        whole=whole,
        ground=ground,
        algorithm=algorithm(chain, whole),
        factors=factors,
        statistics=statistics,
    )


def assembled(
    plan: Plan,
    parents: Sequence[str] = (),
    looked_at: Sequence[Mapping[str, Any]] = (),
    kept: Kept | None = None,
    keep: str = "",
) -> Delta:
    """The merged delta of a plan, lazily: replacement tensors, every head, the resized tensors.

    Args:
        plan: of `plan`.
        parents: digests of the deltas, for the lineage.
        looked_at: which images of each task, for the lineage.
        kept: the matrices as thin ones, instead of replacement tensors (see `vtzoo.keeping`).
        keep: how that was asked for, for the lineage.
    """
    others = {n: more for d in plan.deltas for p in d.parts for n, more in further(p.sites).items()}
    thin = {s.key("weight") for s in kept.part.sites} if kept else set[str]()
    sites = tied(sites_of({n: s for n, s in plan.whole.shapes.items() if n not in thin}, plan.statistics), others)
    makers: dict[str, Callable[[], Tensor]] = dict(kept.makers) if kept else {}
    shapes: dict[str, tuple[int, ...]] = dict(kept.shapes) if kept else {}
    dtypes: dict[str, torch.dtype] = dict.fromkeys(makers, torch.float32)
    for site in sites:
        for param in (*site.facts["params"], *site.facts.get("buffers", ())):
            place, name = f"{site.key(FULL)}.{param}", site.key(param)
            makers[place], shapes[place] = (lambda n=name: plan.tensor(n)), plan.whole.shapes[name]
            dtypes[place] = torch.float64 if dtype_of(plan.ground, name) == torch.float64 else torch.float32
    if plan.masking:
        for name in plan.maskable:
            place = f"{MASK}{name}"
            makers[place], dtypes[place] = (lambda n=name: plan.masks(n)), torch.uint8
            shapes[place] = (len(plan.deltas), -(-math.prod(plan.whole.shapes[name]) // 8))
        makers[SCALE], shapes[SCALE], dtypes[SCALE] = plan.scales, (len(plan.deltas),), torch.float32
    for delta in (sharpest(plan.deltas), *plan.deltas):
        for name in delta.tensors:
            if name.startswith((HEAD, BASE)) and name not in makers:
                makers[name], shapes[name] = (lambda d=delta, n=name: d.tensors[n]), shape_of(delta.tensors, name)
    return Delta(
        method=plan.spec,
        parts=(*([kept.part] if kept else []), Part(method=FULL, graft=FULL, sites=sites), *_head_parts(plan.deltas)),
        backbone=plan.deltas[0].backbone,
        tensors=Lazy(makers, shapes, dtypes),
        tasks=tuple({t.name: t for d in plan.deltas for t in d.tasks}.values()),
        lineage=record(
            "merge",
            parents,
            packages=("torch",),
            spec=plan.spec,
            coef=list(plan.coef),
            layers=plan.layers,
            **({"images": [dict(i) for i in looked_at]} if looked_at else {}),
            **({"searched": dict(plan.searched)} if plan.searched else {}),
            **({"keep": keep} if keep else {}),
        ),
    )


def scaled(plan: Plan, factors: Mapping[str, float]) -> Plan:
    """The same merge with further factors on what is merged, by tensor name."""
    return replace(plan, factors={n: plan.factors.get(n, 1.0) * factors.get(n, 1.0) for n in plan.whole.shapes})


def weighed(plan: Plan, coef: Sequence[float]) -> Plan:
    """The same merge with other weights of the deltas; what was known of whole task vectors is found anew.

    Raises:
        UsageError: weights that the algorithm can't use.
    """
    weights = weights_of(coef, len(plan.deltas))
    checks(plan.chain, weights)
    whole = replace(plan.whole, weights=weights)
    return replace(plan, coef=weights, whole=whole, algorithm=algorithm(plan.chain, whole), squares={})


def leveled(plan: Plan, factors: Sequence[float]) -> Plan:
    """The same merge with further factors by depth, the first for what lies before the first block, too; one is for all."""
    levels = sorted(set(plan.whole.depths.values()))
    place = {n: min(levels.index(d), len(factors) - 1) for n, d in plan.whole.depths.items()}
    return scaled(plan, {n: factors[place.get(n, 0)] for n in plan.whole.shapes})


def look(plan: Plan, scene: Scene) -> None:
    """Let the step that must see the merged network do so; what it finds becomes the plan's evidence."""
    step = next(s for s in plan.chain if s.looks)
    step.module.look(scene, **step.knobs)


def _check_masks(chain: Sequence[Step], deltas: Sequence[Delta]) -> None:
    """Refuse masks where it is unclear whose they are.

    Raises:
        UsageError: a delta has not one task, or two have the same.
    """
    step = next((s for s in chain if s.masks), None)
    names = [t.name for d in deltas for t in d.tasks]
    if step and (len(set(names)) != len(deltas) or any(len(d.tasks) != 1 for d in deltas)):
        raise UsageError(
            f"{step.part.name} keeps a mask for each task, and these {len(deltas)} deltas have the tasks {', '.join(names) or 'none'}",
            "give deltas of one task each, no two of the same (vtzoo mv REF NEW --task OLD=NEW renames one)",
        )


def _check_evidence(chain: Sequence[Step], evidence: Sequence[Mapping[str, Tensor]] | None, count: int) -> None:
    """Refuse to start without what the algorithm looks at.

    Raises:
        UsageError: it is missing, or not one a delta.
    """
    step = curious(chain)
    if step and (evidence is None or len(evidence) != count):
        raise UsageError(
            f"{step.part.name} needs {step.needs if step.needs != 'labels' else 'labelled images'} of every task: {len(evidence or ())} given for {count} deltas",
            "give --data once per delta, in the same order, as: --data vtzoo:fashion --data ./birds",
        )


def _head_parts(deltas: Sequence[Delta]) -> tuple[Part, ...]:
    """The methods that build the heads: one choice for all tasks, since a delta says it once.

    Raises:
        NotFoldable: the deltas differ in it.
    """
    kinds = [head_parts(d) for d in deltas if d.tasks]
    if len({json.dumps([[p.method, p.json()["knobs"]] for p in k], sort_keys=True) for k in kinds}) > 1:
        names = " and ".join(sorted({"+".join(p.method for p in k) or "linear" for k in kinds}))
        raise NotFoldable(f"the deltas have heads of different kinds: {names}", "train them with the same kind of head")
    return kinds[0] if kinds else ()


def _order(deltas: Sequence[Delta]) -> list[int]:
    """An order that isn't the user's, so that a symmetric merge gives the same bits whatever order that is."""
    return sorted(range(len(deltas)), key=lambda i: json.dumps(deltas[i].header(), sort_keys=True))


def _keys(deltas: Sequence[Delta], order: Sequence[int]) -> list[str]:
    """Each delta's tasks, and a number where several have the same: what tells task vectors apart in any order."""
    names = [",".join(t.name for t in d.tasks) or d.method for d in deltas]
    found, seen = dict[int, str](), Counter[str]()
    for i in order:
        found[i] = f"{names[i]}#{seen[names[i]]}"
        seen[names[i]] += 1
    return [found[i] for i in range(len(deltas))]


def _statistics(deltas: Sequence[Delta]) -> frozenset[str]:
    """The running statistics that any delta brings, by full name."""
    sites = [s for d in deltas for part in d.parts for s in part.sites]
    return frozenset(s.key(name) for s in sites for name in s.facts.get("buffers", ()))


def sites_of(shapes: Mapping[str, tuple[int, ...]], statistics: frozenset[str]) -> list[Site]:
    """Parameters and running statistics gathered by the module that owns them."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in sorted(shapes):
        module, _, param = name.rpartition(".")
        facts = found.setdefault(module, {"params": {}})
        facts.setdefault("buffers" if name in statistics else "params", {})[param] = list(shapes[name])
    return [Site(name=module, kind="params", facts=facts) for module, facts in found.items()]

"""Fold: write a delta into plain backbone weights. A pure, lazy function of base tensors, delta tensors and config.

Part after part in the order written; per site each edited parameter becomes `Graft.read(name, before)`, the very
function that a live graft uses where its host's weight is read. A method whose fold changes the architecture brings
a `fold` of its own and returns `model_args`. Computed in float32 (float64 when given), cast once by whoever writes.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from vtzoo import registry
from vtzoo.delta import HEAD, Delta, Part, is_linear, with_heads
from vtzoo.errors import NotFoldable, ShapeMismatch, WrongBackbone
from vtzoo.fingerprint import fingerprint
from vtzoo.graft import Before, Graft
from vtzoo.masks import is_masked, of_task
from vtzoo.rebuilt import Saved, saved_grafts
from vtzoo.spec import BackboneCard
from vtzoo.speech import SCALES, TEXT
from vtzoo.tensors import Factors, Lazy, Piece, dtype_of, pieces_of, shape_of, view, working
from vtzoo.tied import further

Thin = Callable[[], Factors | None]


@dataclass(frozen=True)
class Folded(Mapping[str, Tensor]):
    """A full state dict, computed tensor by tensor on access.

    Attributes:
        base: what lies underneath.
        makers: the changed tensors' recipes, and their shapes where they differ from the base's.
        model_args: keyword arguments that the folded timm model needs beside the base's.
        parts: what computes a part of a changed tensor, of those that needn't be computed whole.
        thin: what gives two matrices whose product a changed one is, [out, r] and [r, in], or None where it is no such product.
    """

    base: Mapping[str, Tensor]
    makers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Piece] = field(default_factory=dict)
    thin: Mapping[str, Thin] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        maker = self.makers.get(name)
        return maker() if maker else self.base[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the tensor
        return name in self.makers or name in self.base

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (n for n in self.makers if n not in self.base)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without computing it."""
        return self.shapes[name] if name in self.shapes else shape_of(self.base, name)

    def pieces(self, name: str) -> Piece | None:
        """What computes some entries of a tensor laid flat, where it needn't be computed whole."""
        return self.parts.get(name) if name in self.makers else pieces_of(self.base, name)

    def factors(self, name: str) -> Factors | None:
        """Two matrices whose product a tensor is, where that is known."""
        return self.thin[name]() if name in self.thin else None

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is computed in: float32 (float64 over a float64 base) where it is folded, else as stored."""
        below = dtype_of(self.base, name) if name in self.base else torch.float32
        return below if name not in self.makers or below == torch.float64 else torch.float32

    @property
    def changed(self) -> set[str]:
        """Names that may differ from the bare backbone's, all layers of folding together."""
        below = self.base.changed if isinstance(self.base, Folded) else set[str]()
        return below | set(self.makers)

    @property
    def all_args(self) -> dict[str, Any]:
        """`model_args` of all layers of folding."""
        below = self.base.all_args if isinstance(self.base, Folded) else {}
        return {**below, **self.model_args}


def fold(
    base: Mapping[str, Tensor], delta: Delta, *, task: str | None = None, factor: float = 1.0, check: bool = True
) -> Folded:
    """Fold a delta into its backbone's tensors.

    Args:
        base: the backbone's state dict, timm-named; may be lazy.
        delta: made for this backbone.
        task: whose head to put in; None takes the only one, or none where there are several; "" leaves heads out.
        factor: how far to go from the base to the delta (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, eq. 1); the head is
            taken whole, since the base has none.
        check: compare fingerprints first, which reads the whole base.

    Returns:
        The full state dict, lazily, with `.model_args`.

    Raises:
        NotFoldable: a part has no exact form in plain weights, and why.
        ShapeMismatch: the base is another architecture.
        WrongBackbone: the base holds other weights.
        UsageError: each task has a network of its own, and none is named.
    """
    if check:
        check_base(base, delta)
    ground = grounded(base, delta)
    delta = of_task(delta, ground, task)
    folded = _fold_parts(ground, delta)
    if factor != 1.0:
        folded = _between(ground, folded, factor, delta.method)
    args = imaging(delta.backbone)
    if task == "" or (task is None and len(delta.tasks) != 1):
        return Folded(folded, model_args=args) if args else folded
    head = plain_head(delta, delta.task(task).name)
    return Folded(folded, {n: (lambda n=n: head[n]) for n in head}, {n: shape_of(head, n) for n in head}, args)


def plain_head(delta: Delta, task: str) -> Mapping[str, Tensor]:
    """A task's classifier as a linear layer's tensors, by timm's names.

    Raises:
        NotFoldable: it is more than that.
    """
    head: Mapping[str, Tensor] = delta.head(task)
    for part in delta.parts:
        if hasattr(part.module, "fold_head"):
            head = part.module.fold_head(head, part.config)
        elif hasattr(part.module, "head") and not is_linear(head):
            raise NotFoldable(
                f"{part.method}: {reason(part.method)}",
                "fold --headless, or export onnx, which keeps the head as it is",
            )
    return head


def with_plain_heads(delta: Delta) -> Delta:
    """The same delta, its heads written as one linear layer each where a method that has nothing else knows how."""
    gone = tuple(p for p in delta.parts if hasattr(p.module, "fold_head") and not p.sites)
    if not gone:
        return delta
    heads = {f"{HEAD}{t.name}/{n}": v for t in delta.tasks for n, v in plain_head(delta, t.name).items()}
    return with_heads(delta, heads).with_(parts=tuple(p for p in delta.parts if p not in gone))


def check_base(base: Mapping[str, Tensor], delta: Delta) -> None:
    """Refuse tensors that are not those the delta was made for; a head among them doesn't count.

    Raises:
        WrongBackbone: the fingerprints differ.
    """
    card = delta.backbone
    inside = tuple(h + "." for h in card.head)
    body = [n for n in base if n not in card.head and not (inside and n.startswith(inside))]
    seen = fingerprint(Lazy({n: (lambda n=n: base[n]) for n in body}, {}))
    if seen != card.fingerprint:
        raise WrongBackbone(
            f"the delta was made for {card.name or card.arch} ({card.fingerprint[:19]}…), these tensors are others ({seen[:19]}…)",
            "give the bare backbone's own state dict, at its own input size",
        )


def grounded(base: Mapping[str, Tensor], delta: Delta) -> Folded:
    """The base at the delta's input size: resized tensors come from the delta. Of a dual encoder it is the image tower."""
    resized, base = delta.overrides, images_of(base, delta.backbone)
    return Folded(base, {n: (lambda n=n: resized[n]) for n in resized}, {n: shape_of(resized, n) for n in resized})


def imaging(card: BackboneCard) -> dict[str, Any]:
    """The `model_args` that leave a dual encoder's image tower alone; none of any other backbone."""
    return {"text": False} if card.model_args.get("text") else {}


def images_of(base: Mapping[str, Tensor], card: BackboneCard) -> Mapping[str, Tensor]:
    """A dual encoder's tensors without the text tower's and the scale of its logits; of any other backbone all."""
    if not card.model_args.get("text"):
        return base
    return view(base, {n: n for n in base if not n.startswith((TEXT, *SCALES))})


def _fold_parts(ground: Folded, delta: Delta) -> Folded:
    """Every part in the order written, except that those with a fold of their own come last.

    What such a part writes (tokens, a prompt behind the patch embedding) is made with the final weights of the others.
    """
    folded = ground
    for part in sorted(delta.parts, key=lambda p: hasattr(p.module, "fold")):
        folded = fold_part(folded, delta.tensors, part, ground)
    return folded


def fold_part(base: Folded, tensors: Mapping[str, Tensor], part: Part, root: Mapping[str, Tensor]) -> Folded:
    """Fold one part of a stack over what the earlier ones gave."""
    module, config = part.module, part.config
    if hasattr(module, "fold"):
        return module.fold(base, site_tensors(tensors, part), part.sites, config)
    makers: dict[str, Callable[[], Tensor]] = {}
    for saved in saved_grafts(tensors, part):
        edits, site = saved.skeleton.edits, saved.site
        if site.name.startswith(TEXT):  # what it does to the text tower is in the head
            continue
        if not edits:
            raise NotFoldable(
                f"{part.method}: {reason(part.method)}", "keep it as a delta, or export onnx, which runs it attached"
            )
        missing = [p for p in edits if site.key(p) not in base]
        if missing:
            raise ShapeMismatch(
                f"this backbone has no {site.key(missing[0])}", "fold into the backbone that the delta names"
            )
        for name in edits:
            makers[site.key(name)] = _maker(saved, name, base, root)
    makers |= {n: makers[first] for first, more in further(part.sites).items() if first in makers for n in more}
    return Folded(base, makers)


def site_tensors(tensors: Mapping[str, Tensor], part: Part) -> dict[str, Mapping[str, Tensor]]:
    """A part's tensors by site name."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for site in part.sites:
        prefix = f"{site.key(part.graft)}."
        found[site.name] = {
            n[len(prefix) :]: tensors[n] for n in tensors if n.startswith(prefix) and "." not in n[len(prefix) :]
        }
    return found


def reason(method: str) -> str:
    """Why a method does not fold, in its own docstring's words."""
    return registry.card("methods", method).folds or "does not fold"


def _between(ground: Folded, folded: Folded, factor: float, method: str) -> Folded:
    """ground + factor * (folded - ground), per tensor."""
    if folded.all_args:
        raise NotFoldable(
            f"{method} changes the architecture when folded ({', '.join(folded.all_args)}), so there is no way between",
            "fold it whole, or interpolate another method's delta",
        )

    def mixed(name: str) -> Tensor:
        after, before = folded[name], ground[name]
        kind = working(after, before)
        return torch.lerp(before.to(kind), after.to(kind), factor)

    return Folded(folded, {n: (lambda n=n: mixed(n)) for n in _touched(ground, folded)})


def _touched(ground: Folded, folded: Folded) -> set[str]:
    """The names that the layers of folding above the ground write."""
    names, layer = set[str](), folded
    while layer is not ground:
        names |= set(layer.makers)
        layer = cast("Folded", layer.base)
    return names


def task_vector(base: Mapping[str, Tensor], delta: Delta) -> Folded:
    """Folded minus base, per tensor, computed when asked for; only the names that the delta touches, each tensor under its first.

    Raises:
        NotFoldable: a part does not fold, or its fold changes the architecture, so that there is no difference to take.
    """
    if is_masked(delta):
        raise NotFoldable(
            f"{delta.method} keeps a network of its own for each task, so it has no one task vector",
            "merge the deltas that it was made of",
        )
    ground = grounded(base, delta)
    folded = _fold_parts(ground, delta)
    if folded.all_args:
        raise NotFoldable(
            f"{delta.method} changes the architecture when folded ({', '.join(folded.all_args)}), so it has no task vector",
            "merge deltas that keep the backbone's shapes",
        )
    names = _touched(ground, folded) - {n for p in delta.parts for more in further(p.sites).values() for n in more}

    def difference(name: str) -> Tensor:
        after, before = folded[name], ground[name]
        kind = working(after, before)
        return after.to(kind) - before.to(kind)

    makers, shapes = {n: (lambda n=n: difference(n)) for n in sorted(names)}, {n: folded.shape(n) for n in names}
    parts, thin = _shortcuts(ground, delta, names)
    return Folded({}, makers, shapes, parts=parts, thin=thin)


def _shortcuts(ground: Folded, delta: Delta, names: Container[str]) -> tuple[dict[str, Piece], dict[str, Thin]]:
    """What needs no whole difference, for tensors that only one part writes.

    Returns:
        What computes some entries, where the delta holds replacements; what gives two matrices, where it may add their product.
    """
    parts, thin, seen = dict[str, Piece](), dict[str, Thin](), Counter[str]()
    for part in delta.parts:
        for saved in saved_grafts(delta.tensors, part):
            graft = saved.skeleton
            for param in graft.edits:
                name = saved.site.key(param)
                seen[name] += 1
                if name not in names:
                    continue
                if type(graft).factors is not Graft.factors:
                    thin[name] = partial(_factors, saved, param)
                if not graft.replaces:
                    continue
                after, before = pieces_of(delta.tensors, saved.prefix + param), pieces_of(ground, name)
                if after and before:
                    parts[name] = partial(_difference, after, before)
    alone = {n for n, count in seen.items() if count == 1}
    return {n: p for n, p in parts.items() if n in alone}, {n: f for n, f in thin.items() if n in alone}


@torch.no_grad()
def _factors(saved: Saved, param: str) -> Factors | None:
    own = saved.own()
    return saved.graft(own, working(*own.values())).factors(param)


def _difference(after: Piece, before: Piece, start: int, stop: int, every: int = 1) -> Tensor:
    a, b = after(start, stop, every), before(start, stop, every)
    kind = working(a, b)
    return a.to(kind).sub_(b.to(kind))  # `a` was made for this


def _maker(saved: Saved, name: str, base: Mapping[str, Tensor], root: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    site = saved.site

    @torch.no_grad()
    def make() -> Tensor:
        own = saved.own()
        kind = working(base[site.key(name)], *(v for v in own.values() if v.is_floating_point()))
        known: dict[tuple[int, str], Tensor] = {}

        def get(source: Mapping[str, Tensor], which: int, param: str) -> Tensor:
            # one object per value, so that a graft can tell by identity whether an earlier part changed it
            changed = isinstance(base, Folded) and site.key(param) in base.changed
            key = (which if changed else 0, param)
            if key not in known:
                known[key] = source[site.key(param)].to(kind)
            return known[key]

        before = Before(lambda n: get(base, 1, n), lambda n: get(root, 0, n))
        return saved.graft(own, kind).read(name, before)

    return make

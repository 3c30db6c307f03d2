"""LoRA between our tensors and the two matrices (and lengths) per layer that other libraries keep."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import Mismatch
from vtzoo.graft import stored
from vtzoo.interop._parts import Piece, words
from vtzoo.methods.lora import EMPTY, Graft

T = TypeVar("T", int, float)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """W' = W + scale * B A of one layer, or m V / |V|; matrices [rank, in * kh * kw], [out, rank], lengths [out]."""

    A: Tensor
    B: Tensor
    scale: float
    m: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.A.shape[0]


def plain(site: Site, graft: Graft, own: Mapping[str, Tensor], weight: Tensor) -> Pair:
    """One of our grafts as a plain pair: PiSSA's first product taken away, parts of a fused qkv in a block structure.

    Either doubles the rank (or more); the numbers stay as they are. `weight` gives lengths to rows that are not adapted.
    """
    A, B, m = own["A"], own["B"], own.get("m")
    if m is not None:
        _check_rows(site, weight)
    if graft.first:
        A, B = torch.cat([A, own["A0"]], -2), torch.cat([B, -own["B0"]], -1)
    if graft.slices:
        thirds = list(B.new_zeros(3, site.shape[0] // 3, len(graft.slices) * A.shape[-2]))
        for i, part in enumerate(graft.slices):
            thirds[part][:, i * A.shape[-2] : (i + 1) * A.shape[-2]] = B[i]
        A, B = A.flatten(0, 1), torch.cat(thirds)
        if m is not None:
            lengths = list(torch.linalg.vector_norm(weight.to(m.dtype).flatten(1), dim=1).chunk(3))
            for i, part in enumerate(graft.slices):
                lengths[part] = m[i]
            m = torch.cat(lengths)
    return Pair(A=A, B=B, scale=graft.scale, m=m)


def piece(
    anatomy: Anatomy,
    pairs: Mapping[str, tuple[Site, Pair]],
    *,
    rank: int = 0,
    alpha: float | None = None,
    rs: bool = False,
    dropout: float = 0.0,
) -> Piece:
    """Our lora of such pairs, all with lengths or all without.

    One rank and alpha stand for all layers, those of the most unless given. A layer of another rank is an exception in
    `ranks`; where its scale is another too, B takes up the ratio. A rank above what a layer holds is written anew at that.
    """
    for name, (site, pair) in pairs.items():
        if pair.m is not None:
            _check_rows(site, stored(anatomy.modules[name], "weight"))
    found = {n: (site, _held(site, pair)) for n, (site, pair) in pairs.items()}
    root, ones = 0.5 if rs else 1.0, [p for _, p in found.values()]
    rank = rank or mode(p.rank for p in ones)
    alpha = alpha or mode(round(p.scale * p.rank**root, 9) for p in ones)
    if alpha == rank and all(_same(p.scale * p.rank**root, p.rank) for p in ones):
        alpha = None
    sites: dict[str, tuple[Site, Mapping[str, Tensor]]] = {}
    ranks: list[str] = []
    for name, (site, pair) in found.items():
        usual = pair.rank == min(rank, _room(site)) and _same((alpha or rank) / rank**root, pair.scale)
        mine, B = (alpha or pair.rank) / pair.rank**root, pair.B
        if not usual:
            B = B if _same(mine, pair.scale) else B * (pair.scale / mine)
            ranks.append(f"{name}:{pair.rank}")
            site = replace(site, facts={**site.facts, "rank": pair.rank})  # noqa: PLW2901 - the same place
        sites[name] = site, {"A": pair.A, "B": B} | ({} if pair.m is None else {"m": pair.m})
    knobs = {"rank": rank, "ranks": ranks, "alpha": alpha, "rs": rs, "dropout": dropout}
    dora, targets = any(p.m is not None for p in ones), words(anatomy, sites)
    return Piece(method="lora", knobs={**knobs, "dora": dora, "targets": targets}, sites=sites)


def _check_rows(site: Site, weight: Tensor) -> None:
    """Refuse DoRA where a row of the weight has no direction: others divide by its length all the same.

    Raises:
        Mismatch: there is one.
    """
    if float(torch.linalg.vector_norm(weight.detach().flatten(1), dim=1).min()) < EMPTY:
        raise Mismatch(
            f"{site.name} has a row of zeros, whose length is that of its update in other libraries' DoRA and 1 in this one's",
            "take LoRA without DoRA, or other layers",
        )


def mode(values: Iterable[T]) -> T:
    """The value that stands most often."""
    return Counter(values).most_common(1)[0][0]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _room(site: Site) -> int:
    return min(site.shape[0], math.prod(site.shape[1:]))


def _held(site: Site, pair: Pair) -> Pair:
    """The same product at the largest rank that the layer holds."""
    if pair.rank <= _room(site):
        return pair
    product = pair.B.double() @ pair.A.double() * pair.scale
    one = torch.eye(_room(site), dtype=pair.A.dtype)
    made = product.to(pair.A.dtype)
    A, B = (made, one) if site.shape[0] < math.prod(site.shape[1:]) else (one, made)
    return Pair(A=A, B=B, scale=1.0, m=pair.m)

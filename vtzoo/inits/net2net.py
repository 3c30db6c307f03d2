"""Net2Net: a wider and deeper network starts as the same function (Chen et al. 2015, arXiv:1511.05641).

    wider     U' = U[g],   W'[:, j] = W[:, g(j)] / |{k: g(k) = g(j)}|        U gives channels, W sums over them, g copies them
    deeper    x + f(x) with f = 0: a copy of a block whose last scales or projections are zero, found by trying

Exact: deeper, bit for bit; wider, but for rounding. Widths over which a norm takes its statistics (a transformer's own) grow by whole multiples, so that
these stay; heads grow in number, not in width. `vtzoo.initial` compares both functions and refuses where they differ.
Departs from the paper: a channel's copies stand beside it and are spread evenly instead of drawn, for one pair of sizes in the same way
everywhere, so that residual sums stay matched; a new block is a residual one that adds nothing, instead of an identity matrix.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.axes import FIXED, IN, OFFSETS, OUT, PATCH, PIXELS, PLACES
from vtzoo.errors import ShapeMismatch
from vtzoo.inits._plan import Plan, layers, names, spread, stages, unlike
from vtzoo.inits._remap import Width, differing, picked, remapped, wrong

PAPER = "arXiv:1511.05641"
EXACT = {"noise": 0.0}


def net2net(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    plan: Plan,
    *,
    noise: Annotated[float, Field(ge=0)] = 0.0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> dict[str, Tensor]:
    """Grow.

    Args:
        source: the smaller network's tensors.
        target: the student's present ones.
        plan: of both.
        noise: standard deviation of what is added to the weights of copied channels, as a share of their tensor's; it breaks their symmetry.
        seed: of the noise.

    Raises:
        ShapeMismatch: the student is the smaller one somewhere, of another family, or no growth to its sizes keeps the function.
    """
    kept, new = _grown(plan)
    pairs = list(names(plan, kept | new))
    if odd := differing(plan, pairs, (FIXED, PLACES, OFFSETS, PATCH, PIXELS)):
        raise ShapeMismatch(f"{odd}, and the function would be another", "give the student the source's input size")
    made = remapped(source, target, plan, pairs, partial(_widened, normalised=plan.source.normalised))
    if noise:
        made = {n: _noisy(n, t, plan, dict(pairs), noise, seed) for n, t in made.items()}
    return made | _silenced(plan, list(new), target)


def _grown(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """The source's block for each of the target's: its own, and for new ones, behind the last of their kind, that one's ("" without any)."""
    kept, new = dict[str, str](), dict[str, str]()
    for row, others in stages(plan):
        left, last = list(others), dict[frozenset[str], str]()
        for block in row:
            kind = layers(plan.target, block)
            if left and layers(plan.source, left[0]) == kind:
                kept[block] = last[kind] = left.pop(0)
            else:
                new[block] = last.get(kind, "")
        if left and len(row) < len(others):
            raise ShapeMismatch(
                f"a stage has {len(others)} blocks in the source and {len(row)} in the student, which would lose some",
                "take weight-selection or fna",
            )
        if left:
            raise unlike(plan, left[0], row[others.index(left[0])])
    return kept, new


def _widened(width: Width, normalised: frozenset[str]) -> Tensor:
    """Copies of channels, and where they are summed over, of each a share."""
    old, new = width.parts
    if any(a > b for a, b in zip(old, new, strict=True)):
        raise wrong(width, "some would be lost", "take weight-selection or fna")
    if width.old.rigid and old[-1] != new[-1]:
        raise wrong(width, "attention scales by a head's width, which must stay", "give it more heads, num_heads=…")
    if width.other in normalised and width.new.size % width.old.size:
        raise wrong(width, "the statistics of norms would be others", "give it a whole multiple of the source's width")
    value = picked(width, spread)
    if width.new.kind != IN:
        return value
    counts = torch.ones((), dtype=value.dtype, device=value.device)
    for a, b in zip(old, new, strict=True):
        index = torch.tensor(spread(a, b), device=value.device)
        counts = counts[..., None] * torch.bincount(index, minlength=a)[index].to(value)
    return value / counts.reshape(-1, *[1] * (value.ndim - width.dim - 1))


def _noisy(name: str, value: Tensor, plan: Plan, pairs: Mapping[str, str], noise: float, seed: int) -> Tensor:
    """With noise in the weights of all channels but the first of equal ones."""
    old, new = plan.source.axes[pairs[name]], plan.target.axes[name]
    if value.ndim < 2 or new[0].kind != OUT or old[0].size == new[0].size:
        return value
    same = (value[1:] == value[:-1]).flatten(1).all(1)
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    copies = torch.cat((same.new_zeros(1), same)).reshape(-1, *[1] * (value.ndim - 1))
    return value + copies * draw.to(value) * (noise * value.std())


def _silenced(plan: Plan, new: Sequence[str], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for what makes new blocks add nothing."""
    found = plan.silent(new) if new else {}
    if loud := [b for b in new if b not in found]:
        raise ShapeMismatch(
            f"{loud[0]} can't be made to add nothing to what it gets, so that the student would be another function",
            "take fna, or give it the source's depth",
        )
    return {n: torch.zeros_like(target[n]) for b in new for n in found[b]}

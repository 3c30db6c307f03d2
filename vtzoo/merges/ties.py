"""TIES: trim each task vector, elect a sign per entry, average those that agree (Yadav et al. 2023, arXiv:2306.01708).

    T_t = D_t where |D_t| is among the largest `density` of task t, else 0
    s   = sign(sum_t w_t T_t)
    D   = scale * sum_{t: sign(T_t) = s} w_t T_t / sum_{t: sign(T_t) = s} w_t          W = W0 + D

Trimming looks at the whole task vector (`scope=vector`, as the paper does) or at each tensor by itself (`scope=tensor`,
as mergekit does). Where the sum is zero nobody is elected and D is zero.
Symmetric: yes.  Neutral: one delta with density 1 and scale 1 comes back, whatever its (positive) weight.
Departs from the paper: weights (the paper has none; a negative one turns its task vector round); zeros don't count
in the density, so the result does not depend on untouched tensors being stored; entries that equal the last one kept
are kept too; where the authors' code elects the majority's sign for a sum of zero, this elects none.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._floor import PIECE, floor
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2306.01708"
SYMMETRIC = True
LOW_RANK = False
_LEAST = 1e-45  # of all float32 above zero


def ties(
    vectors: Vectors,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.2,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    scope: Literal["vector", "tensor"] = "vector",
) -> Tensor:
    """Trim, elect, and take the disjoint mean.

    One pass: what pulls up and what pulls down is summed apart, and the stronger side wins.

    Args:
        vectors: of one tensor.
        density: share of a task's non-zero entries that is kept.
        scale: factor on the mean.
        scope: what the share is taken of.
    """
    (pull, mass), room = torch.zeros(2, 2, math.prod(vectors.shape)), torch.empty(2, PIECE)
    for vector in vectors:
        least = vectors.whole.floor(vector.task, density) if scope == "vector" else floor(vector.value, density)
        pieces = (t.split(PIECE, dim=-1) for t in (vector.value.reshape(-1), pull, mass))
        for value, pulls, masses in zip(*pieces, strict=True):
            _add(value, vector.weight, max(least, _LEAST), pulls, masses, room)
    up, down = pull / mass
    merged = torch.where(pull[0] > pull[1], up, torch.where(pull[0] < pull[1], -down, 0.0))
    return merged.mul_(scale).reshape(vectors.shape)


def _add(value: Tensor, weight: float, least: float, pulls: Tensor, masses: Tensor, room: Tensor) -> None:
    """Add what is left of a piece after trimming, as magnitudes: of the entries that go up, and of those that go down."""
    room = room[:, : len(value)]
    torch.ge(value, least, out=room[0])
    torch.le(value, -least, out=room[1])
    value = value if abs(weight) == 1 else value.mul_(abs(weight))
    for side, left, sign in zip((0, 1) if weight > 0 else (1, 0), room, (1, -1), strict=True):
        masses[side].add_(left, alpha=abs(weight))
        pulls[side].addcmul_(left, value, value=sign)

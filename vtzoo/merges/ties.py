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

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._floor import floor
from vtzoo.merges._whole import Vector, Vectors

PAPER = "arXiv:2306.01708"
SYMMETRIC = True


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
    pull, mass = torch.zeros(2, *vectors.shape), torch.zeros(2, *vectors.shape)
    for vector in vectors:
        least = vectors.whole.floor(vector.task, density) if scope == "vector" else floor(vector.value, density)
        for side, part in enumerate(_sides(vector, least)):
            mass[side] += (part > 0) * abs(vector.weight)
            pull[side] += part.mul_(abs(vector.weight))
    up, down = pull / mass
    return torch.where(pull[0] > pull[1], up, torch.where(pull[0] < pull[1], -down, 0.0)).mul_(scale)


def _sides(vector: Vector, least: float) -> tuple[Tensor, Tensor]:
    """What is left after trimming, as magnitudes: of the entries that go up, and of those that go down."""
    value = vector.value.masked_fill_(vector.value.abs() < least, 0.0)
    ups, downs = value.clamp(min=0), value.clamp(max=0).neg_()
    return (ups, downs) if vector.weight > 0 else (downs, ups)

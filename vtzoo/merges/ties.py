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

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._floor import floor
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2306.01708"
SYMMETRIC = True
LOW_RANK = False
PIECEWISE: Mapping[str, str] = {"scope": "vector"}
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
    (pull, mass), room = torch.zeros(2, 2, *vectors.shape), torch.empty(vectors.shape)
    for vector in vectors:
        least = vectors.whole.floor(vector.task, density) if scope == "vector" else floor(vector.value, density)
        size = abs(vector.weight)
        for i, sign in enumerate((1, -1) if vector.weight > 0 else (-1, 1)):
            beyond = torch.ge if sign > 0 else torch.le
            beyond(
                vector.value, sign * max(least, _LEAST), out=room
            )  # a number, not a bool: products with it are faster
            mass[i].add_(room, alpha=size)
            room.mul_(vector.value)
            pull[i].add_(room if size == 1 else room.mul_(size), alpha=sign)
    torch.sub(*pull, out=room).sign_()  # who wins: 1, -1, or nobody
    pull.div_(mass.clamp_(min=_LEAST))
    pull[0].mul_(room.clamp(min=0))
    pull[1].mul_(room.clamp_(max=0))
    return torch.add(*pull, out=room).mul_(scale)

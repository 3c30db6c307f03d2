"""Breadcrumbs: leave out the largest and the smallest entries of each tensor (Davari & Belilovsky 2023, arXiv:2312.06795).

    D_t' = D_t where |D_t| is neither among the largest `outliers` of the tensor nor below the next `density`, else 0

What remains is merged as the spec says; `breadcrumbs` alone is followed by task arithmetic, as in the paper.
Symmetric: yes.  Neutral: with density 1 nothing is left out.
Departs from the paper: shares are given as what is kept (its beta is 1 - density - outliers); zeros don't count in them.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._floor import floor
from vtzoo.merges._whole import Vector

PAPER = "arXiv:2312.06795"
SYMMETRIC = True
LOW_RANK = False
STAGE = "before"


def breadcrumbs(
    vector: Vector,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.14,
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.01,
) -> Tensor:
    """Mask both ends.

    Args:
        vector: one tensor of one task.
        density: share of the tensor's entries that is kept.
        outliers: share of its largest entries that is left out, never all; less where the density leaves no room, or where
            several are equal.
    """
    value, top = vector.value, min(outliers, 1 - density)
    size, count = value.abs(), int(torch.count_nonzero(value))
    left_out = size < floor(value, min(density + top, 1.0))
    if most := min(round(top * count), max(1, round((density + top) * count)) - 1):
        ceiling = floor(value, most / count)
        largest = size >= ceiling
        left_out |= largest if int(largest.sum()) <= most else size > ceiling
    return value.masked_fill_(left_out, 0.0)

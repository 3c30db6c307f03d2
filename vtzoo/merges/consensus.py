"""Consensus: keep the entries that several tasks use (Wang et al. 2024, arXiv:2405.07813, sec. 4: TALL masks).

    D_all = sum_t w_t D_t
    m_t   = |w_t D_t| >= threshold * |D_all - w_t D_t|        what task t uses of the sum
    D     = scale * D_all where sum_t m_t >= users, else 0

Entries that no task uses (catastrophic) or only one (selfish) are left as the backbone has them.
Symmetric: yes.  Neutral: one delta with scale 1 comes back: what the only task uses is kept.
Departs from the paper: one threshold for all tasks (the paper picks one a task on validation images); with fewer tasks than
`users`, all of them are wanted.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2405.07813"
SYMMETRIC = True
LOW_RANK = False
PIECEWISE: Mapping[str, str] = {}


def consensus(
    vectors: Vectors,
    *,
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.4,
    users: Annotated[int, Field(ge=1)] = 2,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3,
) -> Tensor:
    """Mask the sum.

    Args:
        vectors: of one tensor.
        threshold: how large a task's own entry must be against what the others add.
        users: tasks that must use an entry.
        scale: factor on the sum.
    """
    total, used = vectors.sum(), torch.zeros(vectors.shape)
    for vector in vectors:
        own = vector.value.mul_(vector.weight)
        used += (own != 0) & (own.abs() >= threshold * (total - own).abs())
    return total.mul_(scale).masked_fill_(used < min(users, vectors.count), 0.0)

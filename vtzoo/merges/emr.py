"""EMR: one network, and for each task a mask and a scale (Huang et al. 2024, arXiv:2405.17461, sec. 3.2: elect, mask, rescale).

    s   = sign(sum_t w_t D_t)
    D   = s * max_{t: sign(D_t) = s} |w_t D_t|                       elected
    m_t = D_t * D > 0,   l_t = sum |w_t D_t| / sum |m_t * D|         over the whole of task t
    network of task t:  W0 + l_t * m_t * D

The artifact keeps D and one bit an entry and task; evaluating, folding and exporting it need the task's name.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: a weight multiplies its task vector.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vtzoo.merges._whole import Vector, Vectors

PAPER = "arXiv:2405.17461"
SYMMETRIC = True
LOW_RANK = False
PIECEWISE: Mapping[str, str] = {}
RESCALES = True


def emr(vectors: Vectors) -> Tensor:
    """Elect.

    Args:
        vectors: of one tensor.
    """
    up, down, total = torch.zeros(3, *vectors.shape)
    for vector in vectors:
        own = vector.value.mul_(vector.weight)
        total += own
        torch.maximum(up, own, out=up)
        torch.minimum(down, own, out=down)
    return torch.where(total > 0, up, torch.where(total < 0, down, 0.0))


def mask(vector: Vector, merged: Tensor) -> Tensor:
    """Where a task goes the elected way."""
    return vector.value * vector.weight * merged > 0

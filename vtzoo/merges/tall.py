"""TALL masks: one network, and for each task a mask of what it uses of it (Wang et al. 2024, arXiv:2405.07813, sec. 3).

    D   = sum_t w_t D_t
    m_t = |w_t D_t| >= threshold * |D - w_t D_t|
    network of task t:  W0 + m_t * D

The artifact keeps D and one bit an entry and task; evaluating, folding and exporting it need the task's name. `consensus` makes one
network of the same masks.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: one threshold for all tasks (the paper picks one a task on validation images); a weight multiplies its task vector.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vector, Vectors

PAPER = "arXiv:2405.07813"
SYMMETRIC = True
LOW_RANK = False
PIECEWISE: Mapping[str, str] = {}


def tall(vectors: Vectors, *, threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.4) -> Tensor:  # noqa: ARG001 - the mask's
    """Add up.

    Args:
        vectors: of one tensor.
        threshold: how large a task's own entry must be against what the others add.
    """
    return vectors.sum()


def mask(vector: Vector, merged: Tensor, *, threshold: float) -> Tensor:
    """What a task uses of the sum."""
    own = vector.value * vector.weight
    return (own != 0) & (own.abs() >= threshold * (merged - own).abs())

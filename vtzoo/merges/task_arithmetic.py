"""Task arithmetic: add the task vectors, scaled (Ilharco et al. 2022, arXiv:2212.04089, sec. 2).

    D = scale * sum_t w_t D_t          W = W0 + D

A negative weight subtracts (forgets) a task.
Symmetric: yes.  Neutral: one delta with weight 1 and scale 1 comes back.
Departs from the paper: the scale is a knob with the value 0.3 that later work uses for eight tasks; the paper picks it
on held-out data.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2212.04089"
SYMMETRIC = True
LOW_RANK = True
PIECEWISE: Mapping[str, str] = {}


def task_arithmetic(vectors: Vectors, *, scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3) -> Tensor:
    """Add and scale.

    Args:
        vectors: of one tensor.
        scale: factor on the sum.
    """
    return vectors.sum().mul_(scale)

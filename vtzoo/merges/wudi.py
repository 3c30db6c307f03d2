"""WUDI: the matrix that disturbs no task's own inputs (Cheng et al. 2025, arXiv:2503.08099, eq. 7).

    minimise over D   sum_t |(D - D_t) D_t'|^2 / |D_t|^2            from D = sum_t D_t, by Adam

The rows of D_t lie in the span of the inputs that task t was trained on, so D_t stands for them: no images are needed.
Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: one delta comes back: there is nothing to minimise.
Departs from the paper: kernels are matrices too; a weight multiplies its task vector. The gradient is taken from
sum_t D_t' D_t / |D_t|^2 and sum_t D_t D_t' D_t / |D_t|^2, once for all steps: one product per step, whatever the number of
tasks.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, matrices, shaped, sides
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2503.08099"
SYMMETRIC = True
LOW_RANK = False
_FIRST, _SECOND, _SMALL = 0.9, 0.999, 1e-8  # Adam's


def wudi(
    vectors: Vectors,
    *,
    steps: Annotated[int, Field(ge=0)] = 300,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5,
) -> Tensor:
    """Descend from the sum.

    Args:
        vectors: of one tensor.
        steps: of Adam; the published results stop early on purpose.
        lr: of Adam.
    """
    if not vectors.is_matrix:
        return average(vectors)
    height, width = sides(vectors.shape)
    merged, wanted = torch.zeros(2, height, width, dtype=torch.float64)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for matrix in matrices(vectors):
        merged += matrix
        own = matrix.T @ matrix / matrix.square().sum()
        wanted += matrix @ own
        gram += own
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        slope = (merged @ gram - wanted).mul_(2)
        mean.lerp_(slope, 1 - _FIRST)
        square.mul_(_SECOND).addcmul_(slope, slope, value=1 - _SECOND)
        size = (square / (1 - _SECOND**step)).sqrt_().add_(_SMALL)
        merged.addcdiv_(mean, size, value=-lr / (1 - _FIRST**step))
    return shaped(merged, vectors)

"""WUDI: the matrix that disturbs no task's own inputs (Cheng et al. 2025, arXiv:2503.08099, eq. 7).

    minimise over D   sum_t |(D - D_t) D_t'|^2 / |D_t|^2            from D = sum_t D_t, by Adam

The rows of D_t lie in the span of the inputs that task t was trained on, so D_t stands for them: no images are needed.
Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: one delta comes back: there is nothing to minimise.
Departs from the paper: kernels are matrices too; a weight multiplies its task vector. The gradient is taken from
G = sum_t D_t' D_t / |D_t|^2 and sum_t D_t D_t' D_t / |D_t|^2, found once in float64: one product per step, whatever the number of
tasks, by (G Q) Q' where the inputs span few directions Q, as those of LoRAs do. The steps are taken in float32, as a distance from
the start, so that what rounding leaves of a slope of zero moves nothing.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, matrices, shaped, sides, span
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
    slope, *factors = (m.float() for m in (merged @ gram - wanted, *_factors(gram)))
    moved, mean, square = (torch.zeros_like(slope) for _ in range(3))
    for step in range(1, steps + 1):
        now = torch.linalg.multi_dot([moved, *factors]).add_(slope).mul_(2)
        mean.lerp_(now, 1 - _FIRST)
        square.mul_(_SECOND).addcmul_(now, now, value=1 - _SECOND)
        size = (square / (1 - _SECOND**step)).sqrt_().add_(_SMALL)
        moved.addcdiv_(mean, size, value=-lr / (1 - _FIRST**step))
    return shaped(merged + moved, vectors)


def _factors(gram: Tensor) -> tuple[Tensor, ...]:
    """G [n, n], or G Q [n, r] and Q' [r, n] where these two are less work."""
    reached = span(gram)
    return (gram @ reached, reached.T) if 2 * reached.shape[1] < len(gram) else (gram,)

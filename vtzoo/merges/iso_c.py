"""Iso-C: the sum of the task vectors with all singular values alike (Marczak et al. 2025, arXiv:2502.04959, sec. 4.1).

    sum_t w_t D_t = U S V'
    D = scale * mean(S) * U V'                                      W = W0 + D

Directions that many tasks share no longer outweigh those of a single one. Matrices are weights of linears and kernels of
dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: no: one delta comes back with all its singular values alike.
Departs from the paper: kernels are matrices too; where the sum has low rank, only its own directions are raised to their
mean (the paper's go on to min(out, in), with directions that no task has); a weight multiplies its task vector.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, shaped, summed, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2502.04959"
SYMMETRIC = True
LOW_RANK = True
NEUTRAL = False


def iso_c(vectors: Vectors, *, scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0) -> Tensor:
    """Flatten the spectrum.

    Args:
        vectors: of one tensor.
        scale: factor on the merged matrix.
    """
    if not vectors.is_matrix:
        return average(vectors)
    total, _ = summed(vectors)
    if not total.any():
        return torch.zeros(vectors.shape)
    left, values, right = svd(total)
    return shaped(left @ right * values.mean(), vectors).mul_(scale)

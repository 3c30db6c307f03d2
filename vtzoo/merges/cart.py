"""CART: the mean, and each task's strongest directions away from it (Choi et al. 2024, arXiv:2412.12153).

    M = mean_t w_t D_t,   the first k = `share` * min(out, in) directions of w_t D_t - M stay:  R_t
    D = M + scale * sum_t R_t                                                        W = W0 + D

Around their mean task vectors have fewer directions than around the backbone, and these get less in each other's way.
Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: kernels are matrices too; a weight multiplies its task vector; the scale, which it searches, is 1.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, shaped, sides, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2412.12153"
SYMMETRIC = True
LOW_RANK = True


def cart(
    vectors: Vectors,
    *,
    share: Annotated[float, Field(gt=0, le=1)] = 0.04,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
) -> Tensor:
    """Centre, cut, add up.

    Args:
        vectors: of one tensor.
        share: of a matrix's directions that is kept of each task, one at least.
        scale: factor on what the tasks add to the mean.
    """
    mean = average(vectors)
    if not vectors.is_matrix:
        return mean
    size = sides(vectors.shape)
    merged, centre = torch.zeros(size, dtype=torch.float64), mean.double().reshape(size)
    most, absent = max(1, round(share * min(size))), vectors.count
    for vector in vectors:
        merged += _strongest(vector.value.double().reshape(size) * vector.weight - centre, most)
        absent -= 1
    if absent:  # those that leave the matrix as it is are as far from the mean as it is from zero
        merged += absent * _strongest(-centre, most)
    return shaped(centre + scale * merged, vectors)


def _strongest(matrix: Tensor, most: int) -> Tensor:
    left, values, right = svd(matrix, most)
    return left * values @ right

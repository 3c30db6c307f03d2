"""Iso-CTS: common and task-specific directions, all of one strength (Marczak et al. 2025, arXiv:2502.04959, sec. 4.2).

    sum_t w_t D_t = U S V',  of whose r directions the first k are common: k = r - s T, s = round((1 - common) r / T)
    (I - U_k U_k') D_t = A_t Z_t B_t',  of which the first s are task t's own
    U* = whiten [U_k A_1 .. A_T],  V* likewise
    D  = scale * mean(S_k, Z_1 .. Z_T) * U* V*'                     W = W0 + D

Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: no: one delta comes back with all its singular values alike.
Departs from the paper: as Iso-C; T counts the tasks that touch the tensor, and a matrix with too few directions for one
per task has common ones alone.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import SVD, average, orthogonal, products, shaped, summed, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2502.04959"
SYMMETRIC = True
LOW_RANK = True
NEUTRAL = False


def iso_cts(
    vectors: Vectors,
    *,
    common: Annotated[float, Field(gt=0, le=1)] = 0.8,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
) -> Tensor:
    """Join common and own directions.

    Args:
        vectors: of one tensor.
        common: share of the directions that the sum gives.
        scale: factor on the merged matrix.
    """
    if not vectors.is_matrix:
        return average(vectors)
    total, count = summed(vectors)
    if not total.any():
        return torch.zeros(vectors.shape)
    left, values, right = svd(total)
    own = min(round((1 - common) * len(values) / count), (len(values) - 1) // count)
    first = len(values) - own * count
    parts: list[SVD] = [(left[:, :first], values[:first], right[:first])]
    shared = parts[0][0]
    for matrix, factor in products(vectors) if own else ():
        parts.append(svd(matrix - shared @ (shared.T @ matrix), own, factor))
    left, values, right = (torch.cat([p[i] for p in parts], d) for i, d in ((0, 1), (1, 0), (2, 0)))
    return shaped(orthogonal(left) @ orthogonal(right) * values.mean(), vectors).mul_(scale)

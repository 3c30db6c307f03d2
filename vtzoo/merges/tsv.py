"""TSV-Merge: each task's strongest singular directions, made orthogonal (Gargiulo et al. 2024, arXiv:2412.00081, sec. 4.2).

    D_t = U_t S_t V_t',  of which the first k = min(out, in) / T stay
    U = [U_1 .. U_T] = P Q R'  ->  P R',   V likewise               the nearest matrices with orthonormal columns
    D = scale * U diag(S_1 .. S_T) V'                               W = W0 + D

Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: one delta with scale 1 comes back.
Departs from the paper: kernels, which it averages, are matrices here (networks with convolutions hold most of their weights
in them); T counts the tasks that touch the tensor; a weight multiplies its task vector.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, orthogonal, products, shaped, sides, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2412.00081"
SYMMETRIC = True
LOW_RANK = True


def tsv(vectors: Vectors, *, scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0) -> Tensor:
    """Cut, join, whiten.

    Args:
        vectors: of one tensor.
        scale: factor on the merged matrix.
    """
    if not vectors.is_matrix:
        return average(vectors)
    count = sum(1 for _ in products(vectors))
    if not count:
        return torch.zeros(vectors.shape)
    most = max(1, min(sides(vectors.shape)) // count)
    left, values, right = zip(*(svd(own, most, factor) for own, factor in products(vectors)), strict=True)
    merged = orthogonal(torch.cat(left, 1)) * torch.cat(values) @ orthogonal(torch.cat(right, 0))
    return shaped(merged, vectors).mul_(scale)

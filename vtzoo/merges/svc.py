"""SVC: take back what a merge counts more than once in a direction that tasks share (Li et al. 2026, arXiv:2602.05536).

    D = U S V',   a_t^r = u_r' D_t
    s_t^r = <S_r v_r, a_t^r> / |a_t^r|^2                            how often the merge counts task t in direction r
    S_r  <- S_r * T / sum_t max(least, s_t^r)

After any merge: `ties+svc`; `svc` alone comes after task arithmetic. Matrices are weights of linears and kernels of dense
convolutions; the rest stays as it was merged, as in the authors' code. It has little meaning after `iso-c` and `iso-cts`, which make singular
values alike: rounding then decides which directions U and V have.
Symmetric: yes.  Neutral: one delta comes back, if the merge gives it back.
Departs from the paper: kernels are matrices too; where the authors' code leaves a direction alone unless every task's s is
positive, this is the paper's formula everywhere; T counts the tasks that touch the tensor; a weight multiplies its task vector.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import matrices, sides, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2602.05536"
SYMMETRIC = True
LOW_RANK = True
STAGE = "after"


def svc(merged: Tensor, vectors: Vectors, *, least: Annotated[float, Field(gt=0, le=1)] | None = None) -> Tensor:
    """Calibrate the singular values.

    Args:
        merged: one merged tensor.
        vectors: the task vectors' tensors.
        least: of what a task counts in a direction, so that one which the merge lost is not raised without end; 1 / T
            unless said, and 1 only ever lowers.
    """
    if not vectors.is_matrix or not merged.any():
        return merged
    matrix = merged.double().reshape(sides(vectors.shape))
    left, values, right = svd(matrix)
    counted = torch.zeros(0, len(values), dtype=torch.float64)
    for own in matrices(vectors):
        rows = left.T @ own.reshape(matrix.shape)
        size = rows.square().sum(1)
        share = torch.where(size > 0, (values[:, None] * right * rows).sum(1) / size, 0.0)
        counted = torch.cat([counted, share[None]])
    if not len(counted):
        return merged
    factor = len(counted) / counted.clamp(min=1 / len(counted) if least is None else least).sum(0)
    return (left * (values * factor) @ right).to(torch.float32).reshape(merged.shape)

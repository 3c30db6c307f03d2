"""ACE: the regression of RegMean, with each task's inputs told by its own task vector (Xu et al. 2026, arXiv:2603.02945, alg. 1).

    S_t = C_t' C_t,   C_t = D_t - the mean of its rows                              stands for task t's inputs
    A   = sum_t (S_t + e I) + 1 c',   B = sum_t D_t (S_t + e I)                      c: the mean row of sum_t S_t
    D   = B A^-1

Where the tasks differ much in size, var(l_t) / mean(l_t)^2 > `uneven` with l_t = log |D_t|^2, each S_t is divided by its trace, and
D gets the mean of the first `share` of the singular values of F = D + sum_t D_t (S_t - mean_t S_t) along F's directions.
Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: no: the common row c pulls at one delta, too.
Departs from the paper: kernels are matrices too; e is a share of the mean diagonal of the S_t, where the paper has a number that
depends on the task vectors' size; B has D_t as it is, where the authors' code takes the mean row away; a weight multiplies its task
vector.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, matrices, shaped, sides, svd
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2603.02945"
SYMMETRIC = True
LOW_RANK = True
NEUTRAL = False
_LEAST = 1e-30


def ace(
    vectors: Vectors,
    *,
    ridge: Annotated[float, Field(gt=0, le=1)] = 1e-2,
    uneven: Annotated[float, Field(ge=0)] = 0.3,
    share: Annotated[float, Field(gt=0, le=1)] = 0.3,
) -> Tensor:
    """Estimate, solve, refine.

    Args:
        vectors: of one tensor.
        ridge: added to every input's energy, as a share of their mean.
        uneven: how much the tasks' sizes vary before they are made alike.
        share: of the singular values whose mean is added then.
    """
    sizes = [float(m.square().sum()) for m in matrices(vectors)] if vectors.is_matrix else []
    if not sizes:
        return average(vectors)
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    apart = bool(len(sizes) > 1 and logs.var() > uneven * logs.mean().square())
    height, width = sides(vectors.shape)
    total, pull = torch.zeros(width, width, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    plain = torch.zeros_like(pull)
    for matrix in matrices(vectors):
        spread = _spread(matrix, alike=apart)
        pull += matrix @ spread
        total += spread
        plain += matrix
    floor = ridge * max(float(total.diagonal().mean()), _LEAST) / len(sizes)
    common = total.mean(0, keepdim=True) / (sum(sizes) / len(sizes) if apart else 1.0)
    inputs = total + common
    inputs.diagonal().add_(len(sizes) * floor)
    merged = torch.linalg.solve(inputs, pull + floor * plain, left=False)
    if apart:
        left, values, right = svd(merged + pull - plain @ total / len(sizes))
        count = max(1, int(share * len(values)))
        merged += values[:count].mean() * left[:, :count] @ right[:count]
    return shaped(merged, vectors)


def _spread(matrix: Tensor, *, alike: bool) -> Tensor:
    """S_t [in, in]."""
    centred = matrix - matrix.mean(0, keepdim=True)
    spread = centred.T @ centred
    return spread / spread.trace().clamp(min=1e-30) if alike else spread

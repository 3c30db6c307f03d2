"""RegMean: the matrix whose outputs are nearest to every task's own, on that task's inputs (Jin et al. 2022, arXiv:2212.09849).

    G_t = X_t' X_t                          X_t: what reaches the matrix when task t's network sees task t's images
    G_t with its off-diagonal times `shrink`, plus `ridge` of its mean diagonal
    D   = (sum_t w_t D_t G_t) (sum_t w_t G_t)^-1                                     W = W0 + D

This minimises sum_t w_t |X_t (W - W_t)'|^2 in closed form. Matrices are weights of linears and kernels of dense
convolutions; the rest is averaged.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: kernels, which it averages, are matrices here; a ridge, without which the weights of inputs that hardly any
image uses become a hundred times what any task has, and with which they are averaged; weights are positive.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._regression import check, solved
from vtzoo.merges._whole import Vectors

__all__ = ["check", "regmean"]
PAPER = "arXiv:2212.09849"
SYMMETRIC = True
LOW_RANK = True
NEEDS = "images"
EVIDENCE = "grams"


def regmean(
    vectors: Vectors,
    *,
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.95,
    ridge: Annotated[float, Field(gt=0, le=1)] = 1e-3,
) -> Tensor:
    """Solve the regression.

    Args:
        vectors: of one tensor.
        shrink: factor on what different inputs have in common.
        ridge: added to every input's energy, as a share of their mean.
    """
    return solved(vectors, shrink, ridge)

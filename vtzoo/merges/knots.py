"""KnOTS: merge in the space that all task vectors of a matrix share (Stoica et al. 2024, arXiv:2410.19735, sec. 4).

    [D_1 .. D_T] = U S [V_1 .. V_T]'
    merge the task vectors S V_t' = U' D_t,  then  D = U * merged

A step before a merge: `knots+ties`; `knots` alone is followed by TIES, as in the paper. Sums are the same in any
space: it matters to merges that look at single entries. Matrices are weights of linears and kernels of dense convolutions;
the rest is merged as it is.
Symmetric: yes.  Neutral: one delta comes back, if the merge gives it back.
Departs from the paper: any task vector takes part, not only LoRA's; U is found from sum_t D_t D_t', which has the same
directions; a weight does not change them.
"""

import torch
from torch import Tensor

from vtzoo.merges._spectral import Span, products, sides
from vtzoo.merges._whole import Frame, Vectors

PAPER = "arXiv:2410.19735"
SYMMETRIC = True
LOW_RANK = True
STAGE = "space"
THEN = "ties"


def knots(vectors: Vectors) -> Frame | None:
    """Find the common directions.

    Args:
        vectors: of one tensor.
    """
    if not vectors.is_matrix:
        return None
    reached = Span()
    for own, factor in products(vectors, weighed=False):
        reached.add(own if factor is None else own @ torch.linalg.qr(factor.T).R.T)
    basis = reached.directions()
    if not basis.numel():
        return None

    def into(value: Tensor) -> Tensor:
        return (basis.T @ value.flatten(1).double()).to(torch.float32)

    def back(merged: Tensor) -> Tensor:
        return (basis @ merged.double()).to(torch.float32).reshape(vectors.shape)

    return Frame((basis.shape[1], sides(vectors.shape)[1]), into, back)

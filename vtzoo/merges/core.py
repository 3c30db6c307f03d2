"""Core space: merge in the small space of what all task vectors read and write (Panariello et al. 2025, arXiv:2509.17786, sec. 4).

    D_t = B_t A_t;   U: the directions of [B_1 .. B_T],   V: those of [A_1' .. A_T']
    merge M_t = U' D_t V  [at most T r, T r],  then  D = U * merged * V'

Nothing is lost on the way: D_t = U M_t V'. A step before a merge: `core+ties`; `core` alone is followed by TSV-Merge. Matrices
are weights of linears and kernels of dense convolutions; the rest is merged as it is.
Symmetric: yes.  Neutral: one delta comes back, if the merge gives it back.
Departs from the paper: B_t = P S^(1/2) and A_t = S^(1/2) Q' of the task vector's SVD P S Q', so that the result depends on the task
vector, not on how a LoRA halves it, and any task vector takes part; a weight does not change the directions.
"""

import torch
from torch import Tensor

from vtzoo.merges._spectral import Span, products, svd
from vtzoo.merges._whole import Frame, Vectors

PAPER = "arXiv:2509.17786"
SYMMETRIC = True
LOW_RANK = True
STAGE = "space"
THEN = "tsv"


def core(vectors: Vectors) -> Frame | None:
    """Find the directions on both sides.

    Args:
        vectors: of one tensor.
    """
    if not vectors.is_matrix:
        return None
    left, right = Span(), Span()
    for own, factor in products(vectors, weighed=False):
        writes, strength, reads = svd(own, right=factor)
        left.add(writes * strength.sqrt())
        right.add(reads.T * strength.sqrt())
    u, v = left.directions(), right.directions()
    if not u.numel():
        return None

    def into(value: Tensor) -> Tensor:
        return (u.T @ value.flatten(1).double() @ v).to(torch.float32)

    def back(merged: Tensor) -> Tensor:
        return (u @ merged.double() @ v.T).to(torch.float32).reshape(vectors.shape)

    return Frame((u.shape[1], v.shape[1]), into, back)

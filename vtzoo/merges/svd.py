"""SVD: only the strongest directions of what was merged (Eckart & Young 1936, doi:10.1007/BF02288367).

    D = U S V',   of which the first `rank` directions stay

After any merge: `ties+svd[rank=16]`; `svd` alone comes after task arithmetic, as PEFT's merge of that name. No matrix of this rank is
nearer to D. Matrices are weights of linears and kernels of dense convolutions; the rest stays as it was merged.
Symmetric: yes.  Neutral: with a rank that D does not exceed nothing changes.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import shaped, sides
from vtzoo.merges._spectral import svd as directions
from vtzoo.merges._whole import Vectors

PAPER = "doi:10.1007/BF02288367"
SYMMETRIC = True
LOW_RANK = True
STAGE = "after"
NEUTRAL = False


def svd(merged: Tensor, vectors: Vectors, *, rank: Annotated[int, Field(ge=1)] = 16) -> Tensor:
    """Cut.

    Args:
        merged: one merged tensor.
        vectors: the task vectors' tensors.
        rank: directions that are kept.
    """
    if not vectors.is_matrix or rank >= min(sides(vectors.shape)):
        return merged
    left, values, right = directions(merged.double().reshape(sides(vectors.shape)), rank)
    return shaped(left * values @ right, vectors)

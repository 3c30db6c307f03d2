"""LiNeS: early blocks change less than late ones (Wang et al. 2024, arXiv:2410.17146, eq. 4).

    D_l <- (first + (last - first) * l / (L - 1)) * D_l             in block l of L, counted from the input

After any merge: `task-arithmetic+lines`; `lines` alone comes after task arithmetic. Tensors before the first block have the
first factor, those behind the last one the last.
Symmetric: yes.  Neutral: with first 1 and last 1 nothing changes.
Departs from the paper: the two ends are given, where it gives the first and the rise between them; its first end divides
by the number of tasks what a sum holds, which is the default here; blocks are found by the numbers in the tensors' names.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2410.17146"
SYMMETRIC = True
LOW_RANK = True
STAGE = "after"
DEPTH = True


def lines(
    merged: Tensor,
    vectors: Vectors,
    *,
    first: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None,
    last: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
) -> Tensor:
    """Scale by depth.

    Args:
        merged: one merged tensor.
        vectors: the task vectors' tensors.
        first: factor of the first block; 1 / T unless said.
        last: factor of the last block.
    """
    start = 1 / vectors.count if first is None else first
    return merged.mul_(start + (last - start) * vectors.depth)

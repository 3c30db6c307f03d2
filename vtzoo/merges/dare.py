"""DARE: drop entries of each task vector at random and scale up the rest (Yu et al. 2023, arXiv:2311.03099, sec. 3.2).

    D_t' = m * D_t / density          m = 1 with probability `density`, else 0, for each entry

What remains is merged as the spec says: `dare+ties`; `dare` alone is followed by task arithmetic.
Symmetric: yes.  Neutral: with density 1 nothing is dropped.
Departs from the paper: the density is what is kept, one minus the paper's drop rate. A task's numbers are drawn by its
name, the tensor's and the seed, so that they depend on neither order nor threads.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.merges._draw import uniform
from vtzoo.merges._whole import Vector

PAPER = "arXiv:2311.03099"
SYMMETRIC = True
LOW_RANK = False
STAGE = "before"


def dare(
    vector: Vector,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.5,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Tensor:
    """Drop and rescale.

    Args:
        vector: one tensor of one task.
        density: the probability that an entry is kept.
        seed: of the random numbers.
    """
    kept = uniform(seed, vector.key, tuple(vector.value.shape)) < density
    return vector.value.mul_(kept).div_(density)

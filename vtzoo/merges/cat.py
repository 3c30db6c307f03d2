"""Cat: add up LoRAs by setting their factors side by side (PEFT's add_weighted_adapter, combination_type="cat").

    D = sum_t w_t B_t A_t = [w_1 B_1 .. w_T B_T] [A_1; ..; A_T]                      W = W0 + D

The sum of task arithmetic with scale 1, kept as one LoRA whose rank is the sum of the ranks: no cross terms, nothing lost, and as small
as the deltas together. Each matrix is stored by its singular vectors, the strongest first.
Symmetric: yes.  Neutral: one delta with weight 1 comes back.
Departs from PEFT: biases and norms of a delta are added up, too, and heads are kept.
"""

from collections.abc import Mapping

from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2106.09685"
SYMMETRIC = True
LOW_RANK = True
PIECEWISE: Mapping[str, str] = {}
KEEP = "lora"


def cat(vectors: Vectors) -> Tensor:
    """Add up.

    Args:
        vectors: of one tensor.
    """
    return vectors.sum()

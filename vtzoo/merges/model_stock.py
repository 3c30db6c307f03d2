"""Model Stock: as far towards the mean as the task vectors agree (Jang et al. 2024, arXiv:2403.19522, eq. 7).

    c = mean cosine of pairs (D_i, D_j) of the tensor
    D = T c / (1 + (T - 1) c) * mean_t D_t          W = W0 + D

For several runs on one task: nothing has to be chosen. Tasks that have little in common are pulled to the base.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: any tensor has its own factor, not any layer; task vectors that oppose each other (c below 0) give 0
rather than a step away from their mean; a weight multiplies its task vector.
"""

import torch
from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2403.19522"
SYMMETRIC = True
LOW_RANK = True


def model_stock(vectors: Vectors) -> Tensor:
    """Interpolate between the base and the mean."""
    total, directions, count = torch.zeros(vectors.shape), torch.zeros(vectors.shape), 0
    for vector in vectors:
        value = vector.value.mul_(vector.weight)
        if norm := float(torch.linalg.vector_norm(value, dtype=torch.float64)):
            total += value
            directions += value.div_(norm)
            count += 1
    if count < 2:
        return total
    pairs = float(directions.square().sum(dtype=torch.float64)) - count
    cosine = max(pairs / (count * (count - 1)), 0.0)
    return total.mul_(cosine / (1 + (count - 1) * cosine))

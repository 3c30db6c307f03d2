"""SCE: select entries that differ among tasks, weigh tasks by energy, erase minority signs (Wan et al. 2024, arXiv:2408.07990).

    S    = the `density` of a tensor's entries with the largest variance over the tasks
    e_t  = sum over S of (w_t D_t)^2,   g_t = e_t / sum e
    s    = sign(sum_t w_t D_t)
    D    = scale * sum_{t: sign(D_t) = s} g_t w_t D_t / sum_{t: sign(D_t) = s} g_t      on S, else 0

Symmetric: yes.  Neutral: one delta with density 1 and scale 1 comes back.
Departs from the paper: the scale (the paper has none); entries that equal the last one selected are selected too.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._floor import floor
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2408.07990"
SYMMETRIC = True
LOW_RANK = False


def sce(
    vectors: Vectors,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.1,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
) -> Tensor:
    """Select, calculate, erase.

    Args:
        vectors: of one tensor.
        density: share of the entries that is selected.
        scale: factor on the mean.
    """
    total, mean, spread = torch.zeros(3, *vectors.shape)
    seen = 0
    for vector in vectors:
        value = vector.value.mul_(vector.weight)
        seen += 1
        total += value
        away = value - mean
        mean += away / seen
        spread += away.mul_(value - mean)
    absent = vectors.count - seen  # they are all zeros
    variance = spread + mean.square_().mul_(seen * absent / vectors.count)
    chosen = variance >= floor(variance, density)
    merged, mass = torch.zeros(vectors.shape), torch.zeros(vectors.shape)
    for vector in vectors:
        value = vector.value.mul_(vector.weight)
        agrees = (value.sign() == total.sign()) & chosen & (value != 0)
        energy = float((value * chosen).square().sum(dtype=torch.float64))
        mass += agrees * energy
        merged += (value * agrees).mul_(energy)
    return torch.where(mass > 0, merged / mass, 0.0).mul_(scale)

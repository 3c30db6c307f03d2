"""DELLA: drop entries at random, small ones more often, and scale up the rest (Deep et al. 2024, arXiv:2406.11617, sec. 3.1).

    p_i  = density - window / 2 + window * rank_i / (n - 1)        rank 0 is the smallest |D_t| of a row of n
    D_t' = m * D_t / p,   m_i = 1 with probability p_i, else 0

What remains is merged as the spec says; `della` alone is followed by TIES without trimming, whose election the paper uses.
Symmetric: yes.  Neutral: with density 1 nothing is dropped.
Departs from the paper: the density is what is kept; the window is narrowed where probabilities would leave (0, 1]; rows
are those of a matrix or kernel, and another tensor is one row. The paper scales the mean by a factor of its own, here TIES'.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._draw import uniform
from vtzoo.merges._whole import Vector

PAPER = "arXiv:2406.11617"
SYMMETRIC = True
LOW_RANK = False
STAGE = "before"
THEN = "ties[density=1]"


def della(
    vector: Vector,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.5,
    window: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Tensor:
    """Drop by magnitude and rescale.

    Args:
        vector: one tensor of one task.
        density: the mean probability that an entry is kept.
        window: how far the probabilities of a row's largest and smallest entry lie apart.
        seed: of the random numbers.
    """
    value = vector.value
    rows = value.flatten(1) if value.ndim in (2, 4) else value.reshape(1, -1)
    half = min(window / 2, 1 - density, density * 0.999)
    steps = (
        torch.linspace(density - half, density + half, rows.shape[1]) if rows.shape[1] > 1 else torch.tensor([density])
    )
    kept = torch.empty_like(rows).scatter_(1, rows.abs().argsort(dim=1, stable=True), steps.expand_as(rows))
    drawn = uniform(seed, vector.key, tuple(rows.shape)) < kept
    return (rows * drawn / kept).reshape(value.shape)

"""Karcher mean: the middle of the task vectors' directions on the sphere (Karcher 1977, doi:10.1002/cpa.3160300502).

    u_t = D_t / |D_t|,   p_t = w_t / sum w
    repeat:  g = sum_t p_t log_u(u_t);   u <- exp_u(g)   until |g| <= tolerance
    D = sum_t p_t |D_t| * u                                        W = W0 + D

    log_u(v) = a (v - cos(a) u) / sin(a),   cos(a) = <u, v>;     exp_u(g) = cos|g| u + sin|g| g / |g|

One round from the weighted mean direction is what mergekit calls multislerp: `karcher[rounds=1]`.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the source: of task vectors, tensor by tensor, so that networks of one backbone have directions that differ; the
length is their mean. A tensor where the directions cancel out has no middle and stays the backbone's.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._checks import refuse_negative
from vtzoo.merges._whole import Vectors

PAPER = "doi:10.1002/cpa.3160300502"
SYMMETRIC = True
LOW_RANK = True
_NOWHERE = 1e-6


def karcher(
    vectors: Vectors,
    *,
    rounds: Annotated[int, Field(ge=1)] = 10,
    tolerance: Annotated[float, Field(gt=0)] = 1e-5,
) -> Tensor:
    """Walk to the middle.

    Args:
        vectors: of one tensor.
        rounds: at most.
        tolerance: the step, in radians, that ends it.
    """
    at, length = torch.zeros(vectors.shape), 0.0
    share = sum(vectors.weights)
    for vector in vectors:
        if norm := _norm(vector.value):
            at += vector.value.mul_(vector.weight / share / norm)
            length += vector.weight / share * norm
    if not (size := _norm(at)) > _NOWHERE:
        return torch.zeros(vectors.shape)
    at.div_(size)
    for _ in range(rounds):
        step = torch.zeros(vectors.shape)
        for vector in vectors:
            if norm := _norm(vector.value):
                _log(at, vector.value.div_(norm), vector.weight / share, step)
        if (size := _norm(step)) > 0:
            at.mul_(math.cos(size)).add_(step, alpha=math.sin(size) / size)
            at.div_(_norm(at))
        if size <= tolerance:
            break
    return at.mul_(length)


def _log(at: Tensor, direction: Tensor, weight: float, step: Tensor) -> None:
    """Add weight * log_at(direction) to the step."""
    cosine = min(max(float((at.double() * direction.double()).sum()), -1.0), 1.0)
    away = direction.sub_(at, alpha=cosine)
    if sine := _norm(away):
        step.add_(away, alpha=weight * math.atan2(sine, cosine) / sine)


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def check(weights: Sequence[float]) -> None:
    """Refuse weights that turn a direction round.

    Raises:
        UsageError: one is negative.
    """
    refuse_negative(weights, "give no middle of directions")

"""SLERP: the shorter arc between two networks (Shoemake 1985, doi:10.1145/325334.325242), tensor by tensor.

    W = sin((1 - t) a) / sin(a) * W1 + sin(t a) / sin(a) * W2          a: the angle between W1 and W2

Where they point almost the same way (cosine above 0.9995), or one is zero, W lies on the straight line between them.
Symmetric: no; t counts from the first.  Neutral: it takes two deltas; t = 0 gives the first, t = 1 the second.
Departs from the source: the weights of the backbone take part, as in mergekit; the deltas' own weights multiply their
task vectors.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vectors

PAPER = "doi:10.1145/325334.325242"
SYMMETRIC = False
LOW_RANK = False
TASKS = 2
NEUTRAL = False
GROUND = True
_STRAIGHT = 0.9995


def slerp(vectors: Vectors, *, t: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Tensor:
    """Follow the arc.

    Args:
        vectors: of one tensor.
        t: how far from the first to the second.
    """
    base = vectors.base
    ends = [base, base]
    for vector in vectors:
        ends[vector.task] = base + vector.value.mul_(vector.weight)
    first, second = ends
    norms = [float(torch.linalg.vector_norm(e, dtype=torch.float64)) for e in ends]
    cosine = float((first.double() * second.double()).sum()) / math.prod(norms) if all(norms) else 1.0
    if abs(cosine) > _STRAIGHT:
        return torch.lerp(first, second, t) - base
    angle = math.acos(cosine)
    near, far = (math.sin(s * angle) / math.sin(angle) for s in (1 - t, t))
    return near * first + far * second - base

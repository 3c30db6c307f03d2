"""Fisher merging: every task's say in an entry is how much its predictions depend on it (Matena & Raffel 2021, arXiv:2111.09832).

    F_t = E_x E_y~p_t(y|x) (d log p_t(y|x) / dW)^2                  diagonal, over task t's images
    D   = sum_t w_t F_t D_t / sum_t w_t F_t                         W = W0 + D

Entries on which no task's prediction depends are averaged.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: one label is drawn for each image, not all are gone through; each F_t is divided by its own mean over the
tensor when `normalize` is on, so that a task whose loss is steep does not rule; weights are positive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtzoo.merges._checks import refuse_negative
from vtzoo.merges._spectral import average
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2111.09832"
SYMMETRIC = True
LOW_RANK = False
NEEDS = "images"
HEADS = True
EVIDENCE = "fisher"
_LEAST = 1e-30


def fisher(vectors: Vectors, *, normalize: bool = False) -> Tensor:
    """Take the weighted mean.

    Args:
        vectors: of one tensor.
        normalize: whether each task's information has mean 1 in every tensor.
    """
    pull, mass = torch.zeros(2, *vectors.shape, dtype=torch.float64)
    for task in vectors.whole.order:
        own = _information(vectors, task, normalize=normalize)
        if own is None:
            return average(vectors)
        mass += own  # also of a task that leaves the tensor as it is
    for vector in vectors:
        own = _information(vectors, vector.task, normalize=normalize)
        assert own is not None
        pull += own.mul_(vector.value)
    return torch.where(mass > _LEAST, pull / mass, average(vectors).double()).to(torch.float32)


def _information(vectors: Vectors, task: int, *, normalize: bool) -> Tensor | None:
    seen = vectors.evidence(task)
    if seen is None:
        return None
    own = seen.double()
    return own.mul_(vectors.weights[task] / max(float(own.mean()), _LEAST) if normalize else vectors.weights[task])


def check(weights: Sequence[float]) -> None:
    """Refuse weights that take a task's information away.

    Raises:
        UsageError: one is negative.
    """
    refuse_negative(weights, "leave no mean to take")

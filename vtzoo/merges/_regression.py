"""The regression of RegMean and RegMean++: the matrix whose outputs are nearest to every task's own, on given inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtzoo.merges._checks import refuse_negative
from vtzoo.merges._spectral import average, shaped, sides
from vtzoo.merges._whole import Vectors


def solved(vectors: Vectors, shrink: float, ridge: float) -> Tensor:
    """(sum_t w_t D_t G_t) (sum_t w_t G_t)^-1 with G_t of `vectors.evidence`; the mean where a task has none, or of what is no matrix.

    Args:
        vectors: of one tensor.
        shrink: factor on what different inputs have in common.
        ridge: added to every input's energy, as a share of their mean.
    """
    known = [vectors.evidence(t) is not None for t, w in enumerate(vectors.weights) if w]
    if not vectors.is_matrix or not all(known):
        return average(vectors)
    height, width = sides(vectors.shape)
    wanted, total = (torch.zeros(n, width, dtype=torch.float64) for n in (height, width))
    for vector in vectors:
        wanted += vector.value.flatten(1).double() @ _energy(vectors, vector.task, shrink, ridge)
    for task in vectors.whole.order:  # a task that leaves the matrix as it is wants it to stay
        if vectors.weights[task]:
            total += _energy(vectors, task, shrink, ridge)
    return shaped(torch.linalg.solve(total, wanted, left=False), vectors)


def _energy(vectors: Vectors, task: int, shrink: float, ridge: float) -> Tensor:
    """One task's weighted Gram [in, in]."""
    seen = vectors.evidence(task)
    assert seen is not None
    gram = seen.double()
    diagonal = gram.diagonal() + ridge * gram.diagonal().mean().clamp(min=1e-30)
    gram = gram.mul_(shrink)
    gram.diagonal().copy_(diagonal)
    return gram.mul_(vectors.weights[task])


def check(weights: Sequence[float]) -> None:
    """Refuse weights that take a task's inputs away.

    Raises:
        UsageError: one is negative.
    """
    refuse_negative(weights, "leave no regression to solve")

"""Linear: the weighted mean of the task vectors (Wortsman et al. 2022, model soups, arXiv:2203.05482, sec. 2).

    D = sum_t w_t D_t / sum_t w_t          W = W0 + D

With equal weights this is the mean of the fine-tuned networks. A task that doesn't touch a tensor counts as zero there.
Symmetric: yes.  Neutral: one delta comes back, whatever its weight.
Departs from the paper: the soup is of task vectors, so deltas of different methods mix; heads are kept, not averaged.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vtzoo.errors import UsageError
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2203.05482"
SYMMETRIC = True
LOW_RANK = True
PIECEWISE: Mapping[str, str] = {}


def linear(vectors: Vectors) -> Tensor:
    """Average."""
    total = sum(vectors.weights)
    return vectors.sum([w / total for w in vectors.weights])


def check(weights: Sequence[float]) -> None:
    """Refuse weights that can't be divided by their sum.

    Raises:
        UsageError: they add up to nothing.
    """
    if abs(sum(weights)) <= 1e-6 * sum(abs(w) for w in weights):
        raise UsageError(
            f"the coefficients {', '.join(f'{w:g}' for w in weights)} add up to 0: they have no mean",
            "use task-arithmetic",
        )

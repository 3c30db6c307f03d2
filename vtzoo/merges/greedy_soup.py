"""Greedy soup: the mean of those that make it no worse (Wortsman et al. 2022, arXiv:2203.05482, recipe 1).

    the deltas in order of their own accuracy, the best first;  each joins the mean where the mean's accuracy doesn't fall
    D = mean of those that joined

Accuracy is on labelled images, averaged over the tasks, each with its own head; for several runs on one task give each run that
task's images.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: heads are kept, not averaged, so a delta alone is measured on its own task; a weight counts in the mean.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, tensor

from vtzoo.merges._checks import refuse_negative
from vtzoo.merges._scene import Scene
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2203.05482"
SYMMETRIC = True
LOW_RANK = True
PIECEWISE: Mapping[str, str] = {}
NEEDS = "labels"
HEADS = True


def greedy_soup(vectors: Vectors) -> Tensor:
    """Average those that joined.

    Args:
        vectors: of one tensor.
    """
    joined = [1.0 if (e := vectors.evidence(t)) is None else float(e) for t in range(len(vectors.weights))]
    weights = [w * j for w, j in zip(vectors.weights, joined, strict=True)]
    total = sum(weights)
    return vectors.sum([w / total for w in weights])


def look(scene: Scene) -> None:
    """Find out who joins."""
    tasks = scene.tasks
    alone = {t: _accuracy(scene, [t], [t]) for t in tasks}
    ranked = sorted(tasks, key=lambda t: -alone[t])  # stable: in an order that isn't the user's
    joined, best = ranked[:1], _accuracy(scene, ranked[:1], tasks)
    for task in ranked[1:]:
        now = _accuracy(scene, [*joined, task], tasks)
        if now >= best:
            joined, best = [*joined, task], now
    _tell(scene, joined)


def check(weights: Sequence[float]) -> None:
    """Refuse weights that have no mean.

    Raises:
        UsageError: one is negative.
    """
    refuse_negative(weights, "leave no mean to take")


def _tell(scene: Scene, joined: Sequence[int]) -> None:
    for task, own in enumerate(scene.told):
        own.update(dict.fromkeys(scene.whole.shapes, tensor(float(task in joined))))


def _accuracy(scene: Scene, joined: Sequence[int], tasks: Sequence[int]) -> float:
    """Of the mean of some, averaged over tasks."""
    _tell(scene, joined)
    scene.load()
    return sum(scene.accuracy(t) for t in tasks) / len(tasks)

"""Coefficients of a merge found on images: by a grid, or by CMA-ES (Hansen 2016, arXiv:1604.00772) where there are many.

What is compared, lower is better, averaged over the tasks:

    agreement   KL(expert || merged) of the predicted classes, each expert being the task's own delta alone: no labels
    entropy     of the merged network's predictions (Yang et al. 2023, arXiv:2310.02575): no labels
    accuracy    the share of wrong classes
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vtzoo.errors import UsageError
from vtzoo.merges._scene import Scene
from vtzoo.merging import Plan, leveled, weighed
from vtzoo.tensors import one_thread

What = Literal["scale", "layers", "coef"]
By = Literal["agreement", "entropy", "accuracy"]
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Factors on the merged task vector."""
SPREAD = 0.3
"""The first standard deviation of CMA-ES, on factors around 1."""
MOST = 4.0
TRIES = 60
"""How many points CMA-ES tries."""
Point = tuple[float, ...]
Trial = tuple[Point, float]


@torch.no_grad()
def judge(scene: Scene, by: By) -> Callable[[], float]:
    """A function that says how bad the network is as it is loaded; experts are asked at once."""
    answers: dict[int, Tensor] = {}
    for task in scene.tasks if by == "agreement" else ():
        scene.load_expert(task)
        answers[task] = scene.logits(task, scene.features(task)).log_softmax(-1)

    def bad() -> float:
        total = 0.0
        for task in scene.tasks:
            logs = scene.logits(task, scene.features(task)).log_softmax(-1)
            if by == "accuracy":
                total += (logs.argmax(-1) != scene.labels[task]).double().mean().item()
            elif by == "entropy":
                total -= (logs.exp() * logs).sum(-1).mean().item()
            else:
                total += F.kl_div(logs, answers[task], reduction="batchmean", log_target=True).item()
        return total / len(scene.tasks)

    return bad


def found(plan: Plan, scene: Scene, what: What, by: By, tries: int | None = None) -> tuple[Plan, Trial, int]:
    """The plan that does best, where it lies with what it scored, and how many were tried.

    Args:
        plan: of the merge.
        scene: has the images.
        what: `scale`, one factor on all that is merged; `layers`, one for each depth, from the best scale on; `coef`, one weight a delta.
        by: what is compared.
        tries: how many points CMA-ES may try; 60 unless given.

    Raises:
        UsageError: the tensors' names tell of no depths.
    """
    bad, tries = judge(scene, by), tries or TRIES
    if what == "coef":

        def weigh(point: Point) -> Plan:
            return weighed(plan, [c * p for c, p in zip(plan.coef, point, strict=True)])

        def score(point: Point) -> float:
            if not any(point):
                return math.inf
            scene.load(weigh(point).tensor)
            return bad()

        trials = evolve(score, len(plan.coef), tries)
        return weigh(best(trials)[0]), best(trials), len(trials)
    levels = Levels(plan, scene, bad)
    trials = grid(levels.score, [(f,) for f in GRID])
    if what == "layers":
        if levels.count < 2:
            raise UsageError(
                "the backbone's tensors have no numbers of blocks in their names", "search for a scale instead"
            )
        start = best(trials)[0][0]
        moved = evolve(lambda p: levels.score(tuple(start * f for f in p)), levels.count, tries)
        trials = [(tuple(start * f for f in p), v) for p, v in moved]
    point, value = best(trials)
    return leveled(plan, point), (point, value), len(trials)


class Levels:
    """One factor a depth on what is merged, which is held in memory.

    Args:
        plan: of the merge.
        scene: takes on the merged networks.
        bad: how bad one is.
    """

    def __init__(self, plan: Plan, scene: Scene, bad: Callable[[], float]) -> None:
        self._plan, self._scene, self._bad = plan, scene, bad
        self.count = max(1, len(set(plan.whole.depths.values())))
        with one_thread():
            self._vectors = {n: plan.vector(n) for n in plan.whole.shapes}

    def score(self, point: Point) -> float:
        """How bad it is with them; one factor is for all depths."""
        plan = leveled(replace(self._plan, factors={}), point)

        def tensor(name: str) -> Tensor:
            factor = plan.factors[name]
            factor = min(max(factor, 0.0), 1.0) if name in plan.statistics else factor
            return plan.ground[name] + factor * self._vectors[name]

        self._scene.load(tensor)
        return self._bad()


def grid(score: Callable[[Point], float], points: Sequence[Point]) -> list[Trial]:
    """Try all points."""
    return [(p, score(p)) for p in points]


def evolve(score: Callable[[Point], float], size: int, tries: int, seed: int = 0) -> list[Trial]:
    """Try points of `size` numbers from 0 to 4 around 1, one after another, where CMA-ES wants them; 1 everywhere is tried first."""
    from cmaes import CMA

    first = (1.0,) * size
    found = [(first, score(first))]
    bounds = np.array([[0.0, MOST]] * size)
    strategy = CMA(mean=np.ones(size), sigma=SPREAD, bounds=bounds, seed=seed)
    while len(found) < tries:
        asked = [strategy.ask() for _ in range(strategy.population_size)]
        told = [(a, score(tuple(map(float, a)))) for a in asked]
        found += [(tuple(map(float, a)), value) for a, value in told]
        strategy.tell(told)
    return found


def best(trials: Sequence[Trial]) -> Trial:
    """The first of the best."""
    return min(trials, key=lambda t: t[1])

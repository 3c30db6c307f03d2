"""A student found by block-wise distilled search (DNA: Li et al. 2020, arXiv:1911.13053; code changlin31/DNA).

    1. what every choice of every stage costs is counted or measured
    2. each stage learns by itself, in all its choices at once, to give what the teacher gives after it, given what the teacher gives before it
    3. each choice is rated by its relative loss on images that were held out; a network by the sum of its stages' ratings
    4. all networks within the budgets are gone through, best first, exactly; of latency a few of the best are then measured as a whole

The teacher is the first lesson's first one, the images are all lessons'. Costs come before training, so that a budget that nothing keeps is refused at once. Ratings and the
measured choice are kept in the zoo's cache: another budget trains nothing again, and a run that goes on finds the network that it began with. The same seed gives the same
ratings on the same machine; milliseconds are measured, and a network near the budget may be taken one time and not another.

The student begins with random weights, as in the paper; those of the search are thrown away.

Departs from the paper: all networks have one width; what a teacher of another number of channels shows is projected, not met by a trained convolution
(see `_shown`); see also `_supernet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from vtzoo import knobs, talk
from vtzoo.backbone import sized, timm_card
from vtzoo.dna._choice import MS, Found, check_affordable, chosen
from vtzoo.dna._costs import Bench, Cost, clocked, counted, wholes
from vtzoo.dna._shown import asked_of, shown
from vtzoo.dna._space import ARCH, LEAST_PIXELS, STAGES, Space
from vtzoo.dna._supernet import rated, supernet, trained
from vtzoo.dna._told import reported, tell
from vtzoo.dna._traversal import Table
from vtzoo.errors import Interrupted, UsageError
from vtzoo.kept import kept, place
from vtzoo.outputs import shapes
from vtzoo.probing import work
from vtzoo.recipe import Recipe
from vtzoo.spec import Preprocess
from vtzoo.student import Student, build_student
from vtzoo.targets import Lesson, Teacher
from vtzoo.zoo import Zoo

NAME = "dna"
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=31)]
BUDGETS = {"params": "parameters", "macs": "multiply_adds", "latency_ms": MS}
"""Knobs, and the kinds of costs that they are of."""
FORM = 1
"""Of what is kept; another one is found anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dna:
    """What is searched for, and where.

    Attributes:
        latency_ms: milliseconds of one image in one onnxruntime thread of this machine.
        params: share of the teacher's parameters.
        macs: share of its multiply-adds.
        width: channels of the first stage, a multiple of 8.
        depths: blocks that a stage may have.
        kernels: sides of its kernels.
        steps: in which each stage is trained; kernels take turns.
        images: views of images that the teacher is asked about, at most.
    """

    latency_ms: Annotated[float, Field(gt=0)] | None = None
    params: Share | None = None
    macs: Share | None = None
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 40
    depths: tuple[Count, ...] = (1, 2, 3)
    kernels: tuple[Side, ...] = (3, 5, 7)
    steps: Count = 600
    images: Annotated[int, Field(ge=2)] = 1024

    def __post_init__(self) -> None:
        """Refuse no budget, and kernels without a middle."""
        if self.latency_ms is None and self.params is None and self.macs is None:
            raise ValueError("say how small, such as dna[latency_ms=2], dna[macs=0.2] or dna[params=0.1]")
        if even := [k for k in self.kernels if k % 2 == 0]:
            raise ValueError(f"kernels have odd sides, not {even[0]}")
        if not self.depths or not self.kernels:
            raise ValueError("give at least one depth and one kernel")

    @property
    def space(self) -> Space:
        """The networks."""
        return Space(self.width, tuple(sorted(set(self.depths))), tuple(sorted(set(self.kernels))))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A search as it is asked for."""

    wish: Dna
    lessons: Sequence[Lesson]
    views: int
    recipe: Recipe
    folder: Path
    bench: Bench

    @property
    def teacher(self) -> Teacher:
        """Who is asked."""
        return self.lessons[0].teachers[0]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides ratings."""
        lessons = [n.facts for n in self.lessons]
        how = {k: v for k, v in knobs.encode(self.wish).items() if k not in BUDGETS}
        return {
            "form": FORM, "kind": "ratings", "lessons": lessons, "views": self.views, "size": list(self.bench.preprocess.input_size), **how,
            "seed": self.recipe.seed, "precision": self.recipe.precision,
        }  # fmt: skip

    @property
    def choosing(self) -> dict[str, Any]:
        """What decides the choice, but for the machine."""
        budgets = {k: getattr(self.wish, k) for k in BUDGETS}
        return {**self.facts, "kind": "choice", **budgets, "classes": self.bench.classes}


def searched(text: str, zoo: Zoo, lessons: Sequence[Lesson], recipe: Recipe, views: int) -> Student:
    """The student that "dna[latency_ms=2]", say, stands for, with a classifier for the first lesson's classes.

    Args:
        text: as typed.
        zoo: in whose cache ratings and the choice are kept.
        lessons: tasks, images and teachers.
        recipe: seed, precision and device; `image_size` is the student's, which else has its teacher's.
        views: of each image at most.

    Raises:
        UsageError: no network is as small, or a wish that is none.
        Mismatch: the teacher shows fewer than four depths.
        Interrupted: stopped by the user.
    """
    wish = knobs.decode(Dna, knobs.one(text).knobs, NAME)
    assert isinstance(wish, Dna)
    teacher, classes = lessons[0].teachers[0], len(lessons[0].classes)
    side = recipe.image_size or teacher.preprocess.input_size[1]
    if side < LEAST_PIXELS:
        raise UsageError(f"the networks that are searched take no images of {side} pixels", f"add --image-size {LEAST_PIXELS}")  # fmt: skip
    bench = _bench(wish.space, classes, sized(timm_card(ARCH), side)[0].preprocess)
    folder = zoo.root / ".vtzoo" / "cache" / "searches"
    asked = asked_of(lessons, wish.images)
    job = _Job(wish=wish, lessons=asked, views=max(1, views), recipe=recipe, folder=folder, bench=bench)
    report = reported(wish.space, found := _found(job), _ratings(job))
    tell(found, report, _wholes(job))
    torch.manual_seed(recipe.seed)
    return replace(build_student(report["student"], zoo, classes, side), search=report)


def _bench(space: Space, classes: int, preprocess: Preprocess) -> Bench:
    with torch.random.fork_rng(devices=[]):
        found = shapes(space.network(space.smallest, 0), preprocess.input_size, {"maps"}, STAGES)
    return Bench(space, classes, preprocess, found)


def _found(job: _Job) -> Found:
    """The choice, found before or now.

    Raises:
        UsageError: nothing keeps the budgets.
    """
    anew: list[Found] = []

    def make() -> dict[str, Tensor]:
        found = _choose(job)
        anew.append(found)
        return {
            "choice": torch.tensor(found.choice), "measured": torch.tensor([*found.measured]).reshape(-1, STAGES),
            "ms": torch.tensor([*found.measured.values()], dtype=torch.float64),
            "costs": torch.tensor([c.stages for c in found.costs.values()], dtype=torch.float64),
            "rests": torch.tensor([c.rest for c in found.costs.values()], dtype=torch.float64),
        }  # fmt: skip

    stored = kept(job.folder, job.choosing, make)
    if anew:
        return anew[0]
    talk.say(f"this search was made before; to measure again remove {place(job.folder, job.choosing)}")
    costs = {n: Cost(t, r) for n, t, r in zip(BUDGETS.values(), stored["costs"].tolist(), stored["rests"].tolist(), strict=False)}  # fmt: skip
    measured = {tuple(c): ms for c, ms in zip(stored["measured"].tolist(), stored["ms"].tolist(), strict=True)}
    return Found(tuple(stored["choice"].tolist()), costs, measured)


def _choose(job: _Job) -> Found:
    """Costs, then ratings, then the best network within the budgets.

    Raises:
        UsageError: there is none.
    """
    costs = dict(zip(BUDGETS.values(), counted(job.bench), strict=False))
    theirs = _wholes(job)
    budgets = {
        kind: theirs.get(kind, 1) * most
        for knob, kind in BUDGETS.items()
        if (most := getattr(job.wish, knob)) is not None
    }
    check_affordable(costs, {k: b for k, b in budgets.items() if k != MS}, theirs)
    if MS in budgets:
        costs[MS] = clocked(job.bench)
        check_affordable(costs, budgets, theirs)
    choice, measured = chosen(_ratings(job), costs, budgets, lambda some: wholes(job.bench, some))
    return Found(choice, costs, measured)


def _wholes(job: _Job) -> dict[str, float]:
    """The teacher's parameters and multiply-adds."""
    found = work(job.teacher.live.model, job.teacher.preprocess.input_size)
    return dict(zip(BUDGETS.values(), found, strict=False))


def _ratings(job: _Job) -> Table:
    """Of each choice of each stage, from the cache, or found now.

    Raises:
        Interrupted: stopped by the user.
    """
    stored = kept(job.folder, job.facts, lambda: {"ratings": torch.tensor(_rated(job), dtype=torch.float64)})
    return stored["ratings"].tolist()


def _rated(job: _Job) -> Table:
    """Train every stage, and rate its choices."""
    recipe, picks = job.recipe, job.wish.space.picks
    images = shown(job.lessons, job.wish.images, job.views, job.bench.shapes, job.bench.preprocess, recipe.seed)
    talk.say(f"search: {len(picks)} choices of each of {STAGES} stages, {images.trained} views of images, {len(images.held)} to rate on")  # fmt: skip
    torch.manual_seed(recipe.seed)
    table: list[list[float]] = []
    for number, stage in enumerate(supernet(job.wish.space)):
        try:
            trained(stage, number, images, job.wish.steps, recipe)
        except Interrupted as stop:
            raise Interrupted(f"interrupted in stage {number + 1} of the search", "start the same command again") from stop  # fmt: skip
        ratings = rated(stage, number, images)
        table.append([ratings[pick] for pick in picks])
    return table

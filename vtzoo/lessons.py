"""What a student is trained on: the images of all tasks in one shuffled row, each with what its task's teachers say of it."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.crops import labels_of, normalised, rendered
from vtzoo.errors import UsageError
from vtzoo.losses._outputs import Outputs, Shapes, given
from vtzoo.objective import Objective, Term, needs_of
from vtzoo.outputs import LEVELS, levels_of, shapes
from vtzoo.pupil import Pupil
from vtzoo.recipe import Recipe
from vtzoo.spec import Preprocess
from vtzoo.targets import Answers, Lesson

HELD_OUT, LEAST, MOST = 0.02, 3, 64
"""The share of images that is never trained on; images of a lesson at least, and images at once in validation."""
SAMPLE = 1024
"""How many of a teacher's features its standard form is fitted to."""
Place = tuple[int, int]


@dataclass(eq=False, kw_only=True)
class Course:
    """All lessons, and how a student goes through them.

    Attributes:
        lessons: one a task.
        needs: what the loss looks at.
        levels: how many maps are compared.
        preprocess: the student's.
        recipe: epochs, batch size, seed.
        views: of each image; 0 where each epoch has its own.
        kept: the lessons' answers on disk; empty where teachers answer in every step.
        order: places of all images that are trained on, as (lesson, image).
        held: the others.
        taught: whether batches hold what teachers say; else labels alone.
    """

    lessons: Sequence[Lesson]
    needs: frozenset[str]
    levels: int
    preprocess: Preprocess
    recipe: Recipe
    views: int
    kept: Sequence[Answers]
    order: Sequence[Place]
    held: Sequence[Place]
    taught: bool = True

    @cached_property
    def steps(self) -> int:
        """Of an epoch: no batch has less than a pair."""
        counts = Counter(number for number, _ in self.order)
        return max(1, min(-(-len(self.order) // self.recipe.batch_size), sum(n // 2 for n in counts.values())))

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """An epoch's batches from a step on, as even as can be."""
        pairs = self._pairs(epoch)
        ends = [len(pairs) * i // self.steps for i in range(self.steps + 1)]
        for first, last in list(pairwise(ends))[start:]:
            places = [place for pair in pairs[first:last] for place in pair]
            yield self.batch(epoch % self.views if self.views else epoch, places)

    def _pairs(self, epoch: int) -> list[list[Place]]:
        """The images in random order, two or three of one task at a time: norms that gather statistics want no single one."""
        draw, found = random.Random(f"{self.recipe.seed}/{epoch}"), list[list[Place]]()
        for number in range(len(self.lessons)):
            own = [place for place in self.order if place[0] == number]
            draw.shuffle(own)
            cuts = [*range(0, len(own) - 1, 2), len(own)]
            found += [own[a:b] for a, b in pairwise(cuts)]
        draw.shuffle(found)
        return found

    def batch(self, view: int, places: Sequence[Place]) -> tuple[Tensor, ...]:
        """The student's input, how many images each lesson has in it, and lesson by lesson labels, logits, features and maps as needed."""
        found: list[Tensor] = []
        pixels: list[Tensor] = []
        counts = [0] * len(self.lessons)
        for number, lesson in enumerate(self.lessons):
            own = sorted(i for n, i in places if n == number)
            counts[number] = len(own)
            if own:
                pixels.append(self._pixels(number, view, own))
                found.append(labels_of(lesson.images, lesson.crops, view, own))
                found += flat(self._answers(number, view, own)) if self.taught else []
        return normalised(torch.cat(pixels), self.preprocess), torch.tensor(counts), *found

    def _pixels(self, number: int, view: int, places: Sequence[int]) -> Tensor:
        if self.kept:
            return self.kept[number].pixels(view, places)
        lesson, size = self.lessons[number], self.preprocess.input_size[1:]
        return rendered(lesson.images, lesson.crops, view, places, size, lesson.workers)

    def _answers(self, number: int, view: int, places: Sequence[int]) -> list[Outputs]:
        return (self.kept or self.lessons)[number].ask(view, places)

    def loss(self, pupil: Pupil, objective: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean over a batch's images."""
        x, counted, *rest = batch
        counts, columns = counted.tolist(), iter(rest)
        ours = pupil.answers(x, counts, self.needs, self.levels)
        total = torch.zeros((), device=x.device)
        for lesson, count, answer in zip(self.lessons, counts, ours, strict=True):
            if count:
                labels = next(columns)
                theirs = self._read(columns, len(lesson.teachers)) if self.taught else []
                who = [t.known for t in lesson.teachers]
                total = total + objective(answer, theirs, labels, who) * (count / len(x))
        return total

    def _read(self, columns: Iterator[Tensor], teachers: int) -> list[Outputs]:
        logits = next(columns) if {"logits", "token"} & self.needs else None
        found: list[Outputs] = []
        for _ in range(teachers):
            features = next(columns) if "features" in self.needs else None
            found.append(
                Outputs(
                    logits, features, tuple(next(columns) for _ in range(self.levels if "maps" in self.needs else 0))
                )
            )
        return found

    @torch.inference_mode()
    def validate(self, pupil: nn.Module, objective: nn.Module) -> dict[str, float]:
        """The loss on the images that were held out, in their first view."""
        assert isinstance(pupil, Pupil)
        was, total = pupil.training, 0.0
        pupil.eval()
        objective.eval()
        device = next(pupil.parameters()).device
        for start in range(0, len(self.held), MOST):
            part = self.held[start : start + MOST]
            batch = tuple(t.to(device) for t in self.batch(0, part))
            total += self.loss(pupil, objective, batch).item() * len(part)
        pupil.train(was)
        objective.train(was)
        return {"val_loss": total / len(self.held)}


def flat(answers: Sequence[Outputs]) -> list[Tensor]:
    """The teachers' logits, then teacher by teacher features and maps, those that there are."""
    return [t for t in (answers[0].logits, *(t for a in answers for t in (a.features, *a.maps))) if t is not None]


class Labels(nn.Module):
    """What a student without a teacher learns: cross-entropy with the labels."""

    def forward(self, ours: Outputs, theirs: Sequence[Outputs], labels: Tensor, who: Sequence[str]) -> Tensor:  # noqa: ARG002 - as an objective is called
        """Mean over the images of one task."""
        return F.cross_entropy(given(ours.logits), labels)


def parted(lessons: Sequence[Lesson], seed: int) -> tuple[list[Place], list[Place]]:
    """Places of the images that are trained on, and of those that are held out: a fiftieth of each lesson, one at least.

    Raises:
        UsageError: a lesson of fewer than three images.
    """
    trained: list[Place] = []
    held: list[Place] = []
    for number, lesson in enumerate(lessons):
        if len(lesson.images) < LEAST:
            few = f"{len(lesson.images)} images are too few: some are held out, and a batch has two"
            raise UsageError(few, "give more images, or a larger limit")
        order = list(range(len(lesson.images)))
        random.Random(seed).shuffle(order)
        count = max(1, int(len(order) * HELD_OUT))
        held += [(number, i) for i in order[:count]]
        trained += [(number, i) for i in order[count:]]
    return trained, held


def prepared(
    lessons: Sequence[Lesson], pupil: Pupil, terms: Sequence[Term], preprocess: Preprocess, recipe: Recipe, views: int, folder: Path | None
) -> tuple[Course, Objective]:  # fmt: skip
    """A course whose answers are on disk, and the objective fitted to its teachers.

    Args:
        lessons: one a task.
        pupil: who learns.
        terms: of the loss.
        preprocess: the pupil's.
        recipe: of the training.
        views: of each image.
        folder: of the answers; None where teachers answer in every step.
    """
    order, held = parted(lessons, recipe.seed)
    needs = needs_of(terms)
    everyone = {t.known: t for lesson in lessons for t in lesson.teachers}
    levels = levels_of(pupil.trunk, *(t.live.model for t in everyone.values())) if "maps" in needs else LEVELS
    for lesson in lessons:
        lesson.levels = levels
    kept: list[Answers] = []
    if folder is not None:
        kept = [Answers(lesson, folder, preprocess.input_size[1:]) for lesson in lessons]
        for answers in kept:
            answers.prepare(min(views, max(1, recipe.epochs)))
    course = Course(
        lessons=lessons, needs=needs, levels=levels, preprocess=preprocess, recipe=recipe, views=views, kept=kept, order=order, held=held,
    )  # fmt: skip
    return course, _objective(course, pupil, terms)


def _objective(course: Course, pupil: Pupil, terms: Sequence[Term]) -> Objective:
    """The sum of losses, its bridges drawn by the recipe's seed."""
    looks = course.needs & {"features", "maps"}
    if not looks:
        return Objective(terms, Shapes(), {}, {})
    own = shapes(pupil.trunk, course.preprocess.input_size, looks, course.levels)
    theirs: dict[str, Shapes] = {}
    samples: dict[str, list[Tensor]] = {}
    for number, lesson in enumerate(course.lessons):
        for view, at in _sampled(len(lesson.images), course.views, SAMPLE if "features" in looks else 1):
            answers = (course.kept or course.lessons)[number].ask(view, at)
            for teacher, answer in zip(lesson.teachers, answers, strict=True):
                theirs[teacher.known] = _shapes_of(answer)
                if answer.features is not None:
                    samples.setdefault(teacher.known, []).append(answer.features)
    torch.manual_seed(course.recipe.seed)
    return Objective(terms, own, theirs, {who: torch.cat(parts) for who, parts in samples.items()})


def _sampled(images: int, views: int, most: int) -> Iterator[tuple[int, list[int]]]:
    """At most so many places, spread over the images, then over the views; a few at a time, since maps are large."""
    for view in range(max(1, views)):
        left = min(max(0, most - view * images), images)
        places = sorted(random.Random(view).sample(range(images), left))
        yield from ((view, places[start : start + MOST]) for start in range(0, left, MOST))


def _shapes_of(answer: Outputs) -> Shapes:
    width = 0 if answer.features is None else answer.features.shape[-1]
    maps = [tuple(m.shape[1:]) for m in answer.maps]
    return Shapes(width, tuple((c, h, w) for c, h, w in maps))

"""What a teacher shows at four depths of images, in the student's sizes, computed once and held in memory in half precision.

Where teacher and student differ in channels, the teacher's are brought to the student's number: their first principal components, turned so that every channel has
the same variance (PHI-S), beside nothing where the teacher has fewer. So what a stage is to give is what the next one is given, and no choice is helped by a convolution
that the network won't have. Everything is divided by one number, the standard deviation of all elements.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vtzoo import talk
from vtzoo.crops import BATCH, normalised, rendered
from vtzoo.dna._space import STAGES
from vtzoo.errors import Mismatch, UsageError
from vtzoo.losses._hadamard import levelling
from vtzoo.losses._outputs import Shapes
from vtzoo.losses._standard import LEAST, principal
from vtzoo.outputs import levels_of
from vtzoo.spec import Preprocess
from vtzoo.targets import Lesson

MEMORY, HALF = 512 * 2**20, 2
"""Bytes that may be held; of a number."""
HELD_OUT = 0.2
"""The share of images that choices are rated on."""
Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shown:
    """A sample of images, those that are trained on first.

    Attributes:
        pixels: uint8 [n, 3, height, width].
        maps: of each depth, float16 [n, channels, height, width], no larger than the student's.
        trained: how many are trained on.
        sizes: (height, width) of the student's stages.
        preprocess: the student's.
    """

    pixels: Tensor
    maps: Sequence[Tensor]
    trained: int
    sizes: Sequence[tuple[int, int]]
    preprocess: Preprocess

    @property
    def held(self) -> range:
        """Places of the images that choices are rated on."""
        return range(self.trained, len(self.pixels))

    def pair(self, stage: int, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What a stage is given of images at these places, and what it is to give; float32."""
        index = torch.tensor(places)
        first = normalised(self.pixels[index], self.preprocess) if stage == 0 else self._map(stage - 1, index)
        return first, self._map(stage, index)

    def _map(self, level: int, index: Tensor) -> Tensor:
        return _resized(self.maps[level][index].float(), self.sizes[level])


def shown(lessons: Sequence[Lesson], most: int, views: int, shapes: Shapes, preprocess: Preprocess, seed: int) -> Shown:
    """What the teacher of all lessons shows of their images.

    Args:
        lessons: as `asked_of` makes them.
        most: views of images, of all lessons together.
        views: of each image at most.
        shapes: of the student's stages.
        preprocess: the student's.
        seed: of which images are held out.
    """
    few = max(1, BATCH // len(lessons))
    some = random.Random(seed)
    samples = [_maps(n, 0, some.sample(range(len(n.images)), min(few, len(n.images)))) for n in lessons]
    forms = [_form(torch.cat(level), shapes.maps[i][0]) for i, level in enumerate(zip(*samples, strict=True))]
    sizes = [(h, w) for _, h, w in shapes.maps]
    kept = [_least(m.shape[2:], size) for m, size in zip(samples[0], sizes, strict=True)]
    room = 3 * preprocess.input_size[1] * preprocess.input_size[2]
    room += sum(HALF * c * h * w for (c, _, _), (h, w) in zip(shapes.maps, kept, strict=True))
    places = _places(lessons, min(most, MEMORY // room), views, seed)
    pixels: list[Tensor] = []
    maps: list[tuple[Tensor, ...]] = []
    parts = [part for half in places for part in _chunks(half)]
    for number, view, own in talk.track(parts, "teacher", len(parts)):
        lesson = lessons[number]
        pixels.append(rendered(lesson.images, lesson.crops, view, own, preprocess.input_size[1:], lesson.workers))
        found = _maps(lesson, view, own)
        maps.append(tuple(_resized(form(m), to).half() for form, m, to in zip(forms, found, kept, strict=True)))
    levels = [torch.cat(level) for level in zip(*maps, strict=True)]
    return Shown(torch.cat(pixels), levels, len(places[0]), sizes, preprocess)


def asked_of(lessons: Sequence[Lesson], most: int) -> list[Lesson]:
    """The lessons' images, as many of each as there is room for, before the first one's first teacher.

    Raises:
        Mismatch: the teacher shows fewer depths than a student has stages.
        UsageError: a lesson has a single image.
    """
    teacher = lessons[0].teachers[0]
    if levels_of(teacher.live.model) < STAGES:
        raise Mismatch(f"{teacher.card.name} shows fewer than {STAGES} depths, and a search compares as many", "give the student's architecture, or slim[…]")  # fmt: skip
    share = max(2, most // len(lessons))
    if any(len(lesson.images) < 2 for lesson in lessons):
        raise UsageError("a search trains on some images and rates on others", "give more images, or a larger limit")
    return [
        replace(n, images=n.images.limit(share), teachers=[teacher], needs=frozenset({"maps"}), levels=STAGES)
        for n in lessons
    ]


def _maps(lesson: Lesson, view: int, places: Sequence[int]) -> tuple[Tensor, ...]:
    return lesson.ask(view, places)[0].maps


Where = tuple[int, int, int]
"""Lesson, view, place."""


def _places(lessons: Sequence[Lesson], most: int, views: int, seed: int) -> tuple[list[Where], list[Where]]:
    """What is trained on, in as many views as there is room for, and what is rated on, in one."""
    trained: list[Where] = []
    held: list[Where] = []
    for number, lesson in enumerate(lessons):
        count = max(2, min(len(lesson.images), most // len(lessons)))
        order = random.Random(seed).sample(range(len(lesson.images)), count)
        first = max(1, int(HELD_OUT * count))
        seen = max(1, min(views, (most // len(lessons) - first) // (count - first)))
        held += [(number, 0, i) for i in order[:first]]
        trained += [(number, view, i) for view in range(seen) for i in order[first:]]
    return trained, held


def _chunks(places: Sequence[Where]) -> Iterator[tuple[int, int, list[int]]]:
    """Places of one lesson and view together, a few at a time."""
    for number, view in dict.fromkeys(where[:2] for where in places):
        own = [i for *where, i in places if where == [number, view]]
        yield from ((number, view, own[at : at + BATCH]) for at in range(0, len(own), BATCH))


def _form(maps: Tensor, channels: int) -> Form:
    """How maps [n, c, h, w] come to the student's number of channels, and to a standard deviation of about 1."""
    if maps.shape[1] == channels:
        scale = maps.std().clamp(min=LEAST)
        return lambda value: value / scale
    mean, variances, vectors = principal(maps.movedim(1, -1).flatten(0, 2))
    spare = max(0, channels - len(variances))
    variances, vectors = F.pad(variances[-channels:], (spare, 0)), F.pad(vectors[:, -channels:], (spare, 0))
    scale = variances.mean().sqrt().clamp(min=LEAST)
    turned = (vectors @ levelling(variances).T / scale).to(mean.dtype)
    return lambda value: torch.einsum("nchw,cd->ndhw", value - mean[:, None, None], turned)


def _least(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    return min(a[0], b[0]), min(a[1], b[1])


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", antialias=True)

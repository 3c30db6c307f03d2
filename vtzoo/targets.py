"""Teachers' answers to views of images: computed once and kept on disk, or in every step.

What is kept does not depend on the student: logits (of more than 8,192 classes the 1,024 largest, and what is left) and pooled features in
half precision, a file for each view and each block of images, so that a run that was stopped goes on where it was. The student's own
pixels are kept beside them, for every student of that size.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vtzoo import machine, talk
from vtzoo._images import Images
from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.crops import BATCH, Crops, Rendered, normalised, rendered
from vtzoo.devices import channels_last
from vtzoo.errors import Corrupt, Resources
from vtzoo.kept import kept, place
from vtzoo.losses._outputs import Outputs
from vtzoo.outputs import LEVELS, outputs
from vtzoo.spec import BackboneCard, Preprocess, Task, plain

BLOCK = 1024
WHOLE, TOP, TAIL = 8192, 1024, 4.0
"""Up to so many classes all logits are kept; of more, so many, and the temperature at which the others together have the share that they had."""
HALF = 6e4
WORST = 0.02
"""By how much a kept probability may differ from the teacher's on another day."""


@dataclass(eq=False, kw_only=True)
class Teacher:
    """Who answers for one task.

    Attributes:
        artifact: what it is.
        digests: what its weights are known by: its file's, and that of the file with several tasks' heads.
        card: of its network.
        task: whose head answers; None for features alone.
        preprocess: at what it looks.
    """

    artifact: Artifact
    digests: tuple[str, ...]
    card: BackboneCard
    task: Task | None
    preprocess: Preprocess

    @property
    def known(self) -> str:
        """What it is called among others: the same for all tasks of one network."""
        return " ".join(self.digests)

    @property
    def facts(self) -> list[Any]:
        """What decides its answers."""
        card, task = self.card, self.task.name if self.task else ""
        return [*self.digests, card.arch, plain(card.model_args), asdict(self.preprocess), task]

    @cached_property
    def live(self) -> Live:
        """Ready to answer; built when first asked."""
        found = go_live(self.artifact, self.task.name if self.task else ("" if self.artifact.tasks else None))
        channels_last(found.model)
        return found


@dataclass(eq=False, kw_only=True)
class Lesson:
    """One task's images, and who answers; without labels and a task where only features are taught.

    Attributes:
        name: of the task, "" without one.
        images: with labels counted as the teachers count them.
        teachers: all of them answer.
        crops: how views are drawn.
        needs: what the loss wants.
        precision: in which teachers compute, "fp32" or "bf16".
        workers: processes that read images.
        device: where teachers compute.
        levels: how many maps they show, where the loss looks at any.
    """

    name: str
    images: Images
    teachers: Sequence[Teacher]
    crops: Crops
    needs: frozenset[str]
    precision: str = "fp32"
    workers: int = 0
    device: str = "cpu"
    levels: int = LEVELS

    @property
    def asked(self) -> frozenset[str]:
        """Which outputs teachers give."""
        return frozenset({"logits" if n == "token" else n for n in self.needs})

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the task; none where features alone are taught."""
        return self.images.classes if "logits" in self.asked else ()

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the answers beside view and place."""
        who = [t.facts for t in self.teachers]
        needs = sorted(self.asked & {"logits", "features"})
        return {"images": self.images.ordered, "crops": self.crops.facts, "teachers": who, "needs": needs, "precision": self.precision}  # fmt: skip

    @torch.no_grad()
    def ask(self, view: int, places: Sequence[int]) -> list[Outputs]:
        """What each teacher answers to one view of these images; logits are all teachers' together."""
        sizes = list(dict.fromkeys(_size(t.preprocess) for t in self.teachers))
        ready = DataLoader(Rendered(self.images, self.crops, view, places, sizes), BATCH, num_workers=self.workers)
        found: list[list[Outputs]] = [[] for _ in self.teachers]
        for batch in ready:
            for own, teacher in zip(found, self.teachers, strict=True):
                own.append(self._answer(teacher, batch[sizes.index(_size(teacher.preprocess))]))
        return together([_stacked(own) for own in found])

    def _answer(self, teacher: Teacher, pixels: Tensor) -> Outputs:
        model = teacher.live.model.to(self.device)
        x = normalised(pixels, teacher.preprocess).to(self.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return outputs(model, x, self.asked, self.levels)


def _size(shape: Preprocess) -> tuple[int, int]:
    return shape.input_size[1:]


def _stacked(parts: Sequence[Outputs]) -> Outputs:
    """Batches one after the other."""
    logits = [p.logits.float().cpu() for p in parts if p.logits is not None]
    features = [p.features.float().cpu() for p in parts if p.features is not None]
    maps = tuple(torch.cat(level).float().cpu() for level in zip(*(p.maps for p in parts), strict=True))
    return Outputs(torch.cat(logits) if logits else None, torch.cat(features) if features else None, maps)


def together(answers: Sequence[Outputs]) -> list[Outputs]:
    """Teachers of one task: each has features and maps of its own, and the logarithm of all teachers' mean probabilities."""
    logits = [a.logits for a in answers if a.logits is not None]
    if len(logits) < 2:
        return list(answers)
    mean = torch.stack([z.softmax(-1) for z in logits]).mean(0).log().clamp(min=-60)
    return [Outputs(mean, a.features, a.maps) for a in answers]


def packed(answers: Sequence[Outputs]) -> dict[str, Tensor]:
    """Answers as a file keeps them."""
    columns = {f"features.{i}": a.features.half() for i, a in enumerate(answers) if a.features is not None}
    logits = answers[0].logits
    if logits is None:
        return columns
    if logits.shape[1] <= WHOLE:
        return {**columns, "logits": logits.clamp(-HALF, HALF).half()}
    best = logits.topk(TOP)
    others = (logits / TAIL).scatter(1, best.indices, -torch.inf).logsumexp(-1, keepdim=True)
    level = TAIL * (others - math.log(logits.shape[1] - TOP))
    top = (torch.cat((best.values, level), 1) - best.values[:, :1]).clamp(min=-HALF)
    return {**columns, "top": top.half(), "where": best.indices.int(), "classes": torch.tensor([logits.shape[1]])}


def unpacked(columns: Mapping[str, Tensor], rows: Sequence[int], teachers: int) -> list[Outputs]:
    """Answers of so many teachers from a file's columns; of very many classes those that were not among the largest have one logit."""
    index = torch.tensor(rows)
    logits = columns["logits"][index].float() if "logits" in columns else None
    if "top" in columns:
        top, where, classes = columns["top"][index].float(), columns["where"][index].long(), int(columns["classes"])
        logits = top[:, -1:].repeat(1, classes).scatter(1, where, top[:, :-1])
    names = [f"features.{i}" for i in range(teachers)]
    return [Outputs(logits, columns[n][index].float() if n in columns else None) for n in names]


@dataclass(eq=False)
class Answers:
    """A lesson's answers, and a student's pixels of this size (height, width), in files that are mapped when first looked at."""

    lesson: Lesson
    folder: Path
    size: tuple[int, int]
    _open: dict[tuple[str, int, int], dict[str, Tensor]] = field(
        default_factory=dict[tuple[str, int, int], dict[str, Tensor]]
    )

    def prepare(self, views: int) -> None:
        """Compute what is missing of so many views.

        Raises:
            Resources: the disk has no room for it.
        """
        parts = [(v, block) for v in range(views) for block in range(-(-len(self.lesson.images) // BLOCK))]
        self._check_room(parts)
        for view, block in talk.track(parts, f"teacher {self.lesson.name}".strip(), len(parts)):
            for kind in ("pixels", "answers"):
                self._file(kind, view, block)

    def ask(self, view: int, places: Sequence[int]) -> list[Outputs]:
        """What the teachers answered for images at ascending places."""
        many = len(self.lesson.teachers)
        parts = [unpacked(self._file("answers", view, block), rows, many) for block, rows in _by_block(places)]
        return [_stacked(own) for own in zip(*parts, strict=True)]

    def pixels(self, view: int, places: Sequence[int]) -> Tensor:
        """What the student sees of images at ascending places, uint8 [n, 3, h, w]."""
        parts = [self._file("pixels", view, b)["pixels"][torch.tensor(rows)] for b, rows in _by_block(places)]
        return torch.cat(parts)

    def path(self, view: int, block: int) -> Path:
        """A file of answers."""
        return place(self.folder, self._facts("answers", view, block))

    def _file(self, kind: str, view: int, block: int) -> dict[str, Tensor]:
        key = kind, view, block
        if key not in self._open:
            facts = self._facts(kind, view, block)
            self._open[key] = kept(self.folder, facts, lambda: self._made(kind, view, range(*facts["places"])))
        return self._open[key]

    def _facts(self, kind: str, view: int, block: int) -> dict[str, Any]:
        lesson, places = self.lesson, [block * BLOCK, min(len(self.lesson.images), (block + 1) * BLOCK)]
        pixels = {"images": lesson.images.ordered, "crops": lesson.crops.facts, "size": list(self.size)}
        return {**(lesson.facts if kind == "answers" else pixels), "kind": kind, "view": view, "places": places}

    def _made(self, kind: str, view: int, places: range) -> dict[str, Tensor]:
        lesson = self.lesson
        if kind == "answers":
            return packed(lesson.ask(view, places))
        return {"pixels": rendered(lesson.images, lesson.crops, view, places, self.size, lesson.workers)}

    def _check_room(self, parts: Sequence[tuple[int, int]]) -> None:
        """Refuse pixels that the disk can't hold, before the first is drawn."""
        missing = [f for v, b in parts if not place(self.folder, f := self._facts("pixels", v, b)).exists()]
        wanted = sum(3 * self.size[0] * self.size[1] * (f["places"][1] - f["places"][0]) for f in missing)
        if wanted > (free := machine.free_bytes(self.folder)):
            raise Resources(
                f"{len(parts)} views take {wanted >> 20} MiB, {free >> 20} MiB are free in {self.folder}",
                "use fewer --views or images (--set limit=N), or --set cache=off",
            )


def _by_block(places: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Ascending places as the blocks that hold them, and their rows there."""
    found: dict[int, list[int]] = {}
    for at in places:
        found.setdefault(at // BLOCK, []).append(at % BLOCK)
    return list(found.items())


def compared(answers: Answers, views: int, count: int) -> dict[str, Any]:
    """Ask the teachers again for so many of the kept answers, drawn anew each time.

    Returns:
        `checked`, the largest difference of a probability (as it is, and at the temperature of 4) or, relative to the largest feature, of
        a feature, and the share of images whose most probable class differs.

    Raises:
        Corrupt: they answer otherwise than what is kept.
    """
    draw, lesson = random.Random(), answers.lesson
    every = [(v, i) for v in range(views) for i in range(len(lesson.images))]
    chosen = draw.sample(every, min(count, len(every)))
    worst, other = 0.0, 0
    for view, block in sorted({(v, i // BLOCK) for v, i in chosen}):
        places = sorted(i for v, i in chosen if (v, i // BLOCK) == (view, block))
        for known, anew in zip(answers.ask(view, places), lesson.ask(view, places), strict=True):
            worst = max(worst, _apart(known, anew))
            if known.logits is not None and anew.logits is not None:
                other += int((known.logits.argmax(-1) != anew.logits.argmax(-1)).sum())
        if worst > WORST:
            raise Corrupt(
                f"the teachers of {lesson.name or 'these images'} answer otherwise than what is kept of view {view}, by {worst:.2g}",
                f"remove {answers.path(view, block)} and start again",
            )
    many = len(chosen) * len(lesson.teachers)
    return {"task": lesson.name, "checked": len(chosen), "largest_difference": worst, "top1_differs": other / many}


def _apart(known: Outputs, anew: Outputs) -> float:
    worst = 0.0
    if known.logits is not None and anew.logits is not None:
        for t in (1.0, TAIL):
            worst = max(worst, ((known.logits / t).softmax(-1) - (anew.logits / t).softmax(-1)).abs().max().item())
    if known.features is not None and anew.features is not None:
        apart = (known.features - anew.features).abs().max() / anew.features.abs().max().clamp(min=1e-12)
        worst = max(worst, apart.item())
    return worst

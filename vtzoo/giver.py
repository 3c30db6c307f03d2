"""Who gives a student its first weights: any ref, in plain weights, with a classifier for each of the student's tasks that it knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import knobs
from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.backbone import build_sized, soften
from vtzoo.classifier import head_names
from vtzoo.errors import UsageError
from vtzoo.identity import CARD
from vtzoo.initial import started
from vtzoo.installed import head_state
from vtzoo.sensitivity import IMAGES
from vtzoo.slimming import Slim, slimmed
from vtzoo.spec import AND, BackboneCard
from vtzoo.student import Heads, Student
from vtzoo.tensors import fill

SLIM = "slim"
"""A student of this name is made of its teacher."""


@dataclass(frozen=True)
class Giver:
    """Who gives a student its first weights.

    Attributes:
        way: see `vtzoo.inits`, such as "weight-selection[layers=uniform]"; or "slim[macs=0.5]", see `vtzoo.slimming`.
        artifact: a delta is folded first.
        tasks: classes by task, as the student counts them, of those of its tasks that the giver has a classifier for.
        several: whether the student has several tasks.
    """

    way: str
    artifact: Artifact
    tasks: Mapping[str, tuple[str, ...]]
    several: bool

    @property
    def digest(self) -> str:
        """What its weights are known by: "sha256:…" of its file, of a bare backbone its fingerprint."""
        card = self.artifact.card
        return card.fingerprint if card else f"sha256:{self.artifact.digest}"

    def give(self, student: Student) -> Student:
        """The student with other weights, in place, and with the normalisation of pixels that they are made for.

        Raises:
            NotFoldable: the giver has no plain weights.
            ShapeMismatch: the networks are no family.
        """
        live, tasks = self._live(student.card.preprocess.input_size[1])
        own = [f"{task}/{label}" for task, classes in tasks.items() for label in classes]
        if self.several and own:
            _fresh(student.model, len(own))
            student.model.requires_grad_()
        started(student.model, live.model, self.way, name=self.artifact.name, labels=own, source_labels=own)
        card, shape = student.card, live.preprocess
        licenses = {x for both in (card.license, live.card.license) for x in both.split(AND) if x}
        looking = replace(card.preprocess, mean=shape.mean, std=shape.std)
        shown = replace(card, preprocess=looking, license=AND.join(sorted(licenses)))
        return Student(student.model, shown, f"{self.way} of {self.artifact.name}", self._heads(student.model, tasks))

    def slim(self, lessons: Sequence[D.Images], pixels: int | None) -> Student:
        """A student made of the giver, with what the images' classes depend on; its way is "slim[macs=0.5]", say.

        Raises:
            ShapeMismatch: the giver is no network that can be slimmed.
            UsageError: the images have no labels, or another size was asked for.
        """
        wish = knobs.decode(Slim, knobs.one(self.way).knobs, SLIM)
        assert isinstance(wish, Slim)
        live, tasks = self._live(pixels)
        side = live.preprocess.input_size[1]
        if pixels not in (None, side):
            raise UsageError(
                f"{SLIM} keeps the giver's input size, {side} pixels, not {pixels}", "leave --image-size out"
            )
        if any(y < 0 for images in lessons for y in images.labels[:1]):
            raise UsageError("importance is told by classes, and these images have none", "use a loss on logits, with images by class")  # fmt: skip
        plain, few = D.transforms(live.preprocess, train=False), max(1, IMAGES // len(lessons))
        batches = [b for images in lessons for b in D.loader(images.limit(few), plain, batch_size=64)]
        card = live.card
        model, args = slimmed(live.model, card.arch, card.model_args, wish, batches)
        if not (self.several or tasks):
            _fresh(model, len(lessons[0].classes))
        made = BackboneCard(
            name=card.arch, arch=card.arch, model_args=args, preprocess=live.preprocess, license=card.license, head=head_names(model)
        )  # fmt: skip
        return Student(model.requires_grad_(), made, f"{self.way} of {self.artifact.name}", self._heads(model, tasks))

    def _heads(self, model: nn.Module, tasks: Mapping[str, tuple[str, ...]]) -> Heads:
        """Each task's rows of the one classifier that a student of several tasks was given for all."""
        rows, start, found = head_state(model), 0, dict[tuple[str, tuple[str, ...]], Mapping[str, Tensor]]()
        every = sum(map(len, tasks.values()))
        if not self.several or any(len(t) != every for t in rows.values()):
            return found
        for task, classes in tasks.items():
            end = start + len(classes)
            found[task, classes] = {n: t[start:end].detach().clone() for n, t in rows.items()}
            start = end
        return found

    def _live(self, pixels: int | None) -> tuple[Live, Mapping[str, tuple[str, ...]]]:
        """In plain weights, and of which tasks it has the classes, one after the other; a bare backbone at this input size, all others at their own."""
        artifact = self.artifact
        if artifact.card is None:
            lives = [go_live(artifact, name, plain=True) for name in self.tasks]
            if [live.task.classes for live in lives if live.task] == [*self.tasks.values()] and len(lives) == 1:
                return lives[0], self.tasks
            rows = [_rows(live.model, live.task.classes, self.tasks[live.task.name]) for live in lives if live.task]
            if not rows or not all(rows):
                return go_live(artifact, "" if artifact.tasks else None, plain=True), {}
            _classify(lives[0].model, rows)
            return lives[0], self.tasks
        card, model = build_sized(artifact.card, pixels, zoo=artifact.zoo)
        shown: BackboneCard = getattr(model, CARD)
        return Live(
            model=model, card=replace(card, model_args=shown.model_args), task=None, preprocess=card.preprocess
        ), {}


def _fresh(model: nn.Module, classes: int) -> None:
    """A classifier that starts near zero, in place of what is there."""
    model.reset_classifier(classes)  # type: ignore[operator] - a method of timm models
    soften(model)


def _rows(model: nn.Module, given: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
    """A classifier's tensors with its classes in another order; none where not every tensor has a row for each."""
    order, own = [given.index(label) for label in wanted], head_state(model)
    return {n: t.detach()[order] for n, t in own.items()} if all(len(t) == len(order) for t in own.values()) else {}


def _classify(model: nn.Module, heads: Sequence[Mapping[str, Tensor]]) -> None:
    """Give a network one classifier with the classes of all of these."""
    every = {n: torch.cat([head[n] for head in heads]) for n in heads[0]}
    model.reset_classifier(len(next(iter(every.values()))))  # type: ignore[operator] - a method of timm models
    fill(head_state(model), every)
    model.requires_grad_(requires_grad=False).eval()

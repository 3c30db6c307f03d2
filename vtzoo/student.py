"""Build a student from what a person typed: a zoo's network or model with its weights, or a timm architecture with random ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from timm.models import is_model
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import knobs, talk
from vtzoo.anatomy import head_names
from vtzoo.artifact import HEADS, Artifact, Live, described, go_live, open_ref
from vtzoo.backbone import build_card, build_sized, card_of, create, sized, taking, timm_card
from vtzoo.delta import HEAD
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state
from vtzoo.identity import CARD
from vtzoo.initial import started
from vtzoo.sensitivity import IMAGES
from vtzoo.slimming import Slim, slimmed
from vtzoo.spec import BackboneCard, plain
from vtzoo.tensors import TensorFile, prefixed
from vtzoo.zoo import Zoo

SLIM = "slim"
"""A student of this name is made of its teacher."""


@dataclass(frozen=True)
class Student:
    """A network to be trained, with all its parameters.

    Attributes:
        model: with a classifier where classes were asked for.
        card: of it, at its input size.
        start: "pretrained", "random", or from whom it has its first weights, and how.
        heads: classifiers that it brings along, by task and classes.
        search: what a search that found it reports.
    """

    model: nn.Module
    card: BackboneCard
    start: str
    heads: Mapping[tuple[str, tuple[str, ...]], Mapping[str, Tensor]] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Giver:
    """Who gives a student its first weights.

    Attributes:
        way: see `vtzoo.inits`, such as "weight-selection[layers=uniform]"; or "slim[macs=0.5]", see `vtzoo.slimming`.
        artifact: a delta is folded first.
        task: whose head it has; "" for none.
    """

    way: str
    artifact: Artifact
    task: str | None

    def give(self, student: Student) -> Student:
        """The student with other weights, in place.

        Raises:
            NotFoldable: the giver has no plain weights.
            ShapeMismatch: the networks are no family.
        """
        live = self._live(student.card.preprocess.input_size[1])
        own = live.task.classes if live.task else ()
        started(student.model, live.model, self.way, name=self.artifact.ref, labels=own, source_labels=own)
        return replace(student, start=f"{self.way} of {self.artifact.ref}")

    def slim(self, lessons: Sequence[D.Images], pixels: int | None) -> Student:
        """A student made of the giver, with what the images' classes depend on; its way is "slim[macs=0.5]", say.

        Raises:
            ShapeMismatch: the giver is no network that can be slimmed.
            UsageError: the images have no labels, or another size was asked for.
        """
        wish = knobs.decode(Slim, knobs.one(self.way).knobs, SLIM)
        assert isinstance(wish, Slim)
        live = self._live(pixels)
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
        made = BackboneCard(
            name=card.arch, arch=card.arch, model_args=args, preprocess=live.preprocess, license=card.license, head=head_names(model)
        )  # fmt: skip
        return Student(model.requires_grad_(), made, f"{self.way} of {self.artifact.ref}")

    def _live(self, pixels: int | None) -> Live:
        """In plain weights; a bare backbone at this input size, all others at their own."""
        artifact = self.artifact
        if artifact.card is None:
            return go_live(artifact, self.task, plain=True)
        card, model = build_sized(artifact.card, pixels, zoo=artifact.zoo)
        shown: BackboneCard = getattr(model, CARD)
        return Live(model=model, card=replace(card, model_args=shown.model_args), task=None, preprocess=card.preprocess)


def build_student(text: str, zoo: Zoo, classes: int, pixels: int | None) -> Student:
    """Build it at its input size.

    Args:
        text: a name, or a name with arguments: "vit_tiny_patch16_224[depth=8,pretrained=false]".
        zoo: where to look.
        classes: of its classifier, 0 for none.
        pixels: side of its input; its own unless given.

    Raises:
        NotFound: nothing is called so.
        UsageError: arguments that it doesn't take, or that the teacher decides.
        ShapeMismatch: its weights don't fit the arguments.
        Network: its weights must be fetched and can't be.
    """
    part = knobs.one(text) if "[" in text else knobs.Part(text, {})
    args = {k: [*map(yaml.safe_load, v)] if isinstance(v, list) else yaml.safe_load(v) for k, v in part.knobs.items()}
    card, known = _card(part.name, zoo)
    pretrained = args.pop("pretrained", known)
    if not isinstance(pretrained, bool):
        raise UsageError(f"pretrained={pretrained!r} is neither true nor false", f"{part.name}[pretrained=false]")
    if fixed := sorted({"num_classes", "in_chans"} & set(args)):
        raise UsageError(
            f"a student's {' and '.join(fixed)} can't be chosen: its teacher and the images decide", "leave it out"
        )
    side = args.get("img_size", pixels)
    if side is not None and (not isinstance(side, int) or pixels not in (None, side)):
        raise UsageError(f"the student's img_size is {side}, --image-size {pixels}", "give one of them, one number of pixels")  # fmt: skip
    card, sizing = sized(card, side)
    args = {**card.model_args, **sizing, **args}
    start = "pretrained" if pretrained else "random"
    talk.say(f"student {part.name} starts from {start} weights")
    if not pretrained:
        model = taking(card, side, lambda: create(card.arch, pretrained=False, num_classes=classes, **args))
        shape = replace(card.preprocess, crop_pct=1.0, crop_mode="center")
        made = BackboneCard(name=card.arch, arch=card.arch, model_args=args, preprocess=shape, head=head_names(model))
        return Student(model.requires_grad_(), made, start)
    model = taking(card, side, lambda: _pretrained(card, args, zoo, classes))
    return Student(model.requires_grad_(), replace(card, model_args=args), start, _heads(part.name, zoo))


def _heads(name: str, zoo: Zoo) -> dict[tuple[str, tuple[str, ...]], Mapping[str, Tensor]]:
    """The classifiers of an entry that has several."""
    if not any(e.section == "models" and HEADS in e.facts["files"] for e in zoo.entries() if e.name == name):
        return {}
    artifact = open_ref(name, zoo)
    assert artifact.files is not None
    stored = TensorFile(artifact.files[HEADS])
    return {(t.name, t.classes): prefixed(stored, f"{HEAD}{t.name}/") for t in artifact.tasks}


def _pretrained(card: BackboneCard, args: dict[str, Any], zoo: Zoo, classes: int) -> nn.Module:
    """Build with weights; refuses arguments that would leave some of them out or some of the network random."""
    refusal = ShapeMismatch(
        f"the weights of {card.name} do not fit {plain(args)}", "leave arguments out, or add pretrained=false to them"
    )
    try:
        model = build_card(card, zoo=zoo, num_classes=classes, **args)
    except RuntimeError as error:
        raise refusal from error
    if args != card.model_args:  # timm loads what has a name on both sides, and only logs the rest
        own = create(card.arch, pretrained=False, num_classes=0, **card.model_args)
        if set(base_state(model)) != set(base_state(own)):
            raise refusal
    return model


def _card(name: str, zoo: Zoo) -> tuple[BackboneCard, bool]:
    """A student's card, and whether its name stands for weights: a bare architecture that is no entry's name doesn't."""
    sections = {e.section for e in zoo.entries() if e.name == name}
    if "models" in sections:
        model = open_ref(name, zoo)
        assert model.files is not None
        card, _ = described(model.files)
        return replace(card, name=name, source=f"object:sha256:{model.digest}"), True
    if is_model(name) and "." not in name and "backbones" not in sections:
        return timm_card(name), False
    try:
        return card_of(name, zoo), True
    except NotFound:
        if sections:
            raise  # it says what the entry is instead
        return timm_card(name), False

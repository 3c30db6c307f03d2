"""Build a student from what a person typed: a zoo's network or model with its weights, or a timm architecture with random ones."""

from dataclasses import dataclass, replace
from typing import Any

import yaml
from timm.models import is_model
from torch import nn

from vtzoo import knobs, talk
from vtzoo.anatomy import head_names
from vtzoo.artifact import Artifact, described, go_live, open_ref
from vtzoo.backbone import build_card, build_sized, card_of, create, sized, taking, timm_card
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state
from vtzoo.initial import started
from vtzoo.spec import BackboneCard, plain
from vtzoo.zoo import Zoo


@dataclass(frozen=True)
class Student:
    """A network to be trained, with all its parameters.

    Attributes:
        model: with a classifier where classes were asked for.
        card: of it, at its input size.
        start: "pretrained", "random", or from whom it has its first weights, and how.
    """

    model: nn.Module
    card: BackboneCard
    start: str


@dataclass(frozen=True)
class Giver:
    """Who gives a student its first weights.

    Attributes:
        way: see `vtzoo.inits`, such as "weight-selection[layers=uniform]".
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
        artifact, own = self.artifact, tuple[str, ...]()
        if artifact.card is not None:  # a bare backbone comes at the student's size
            _, model = build_sized(artifact.card, student.card.preprocess.input_size[1], zoo=artifact.zoo)
        else:
            live = go_live(artifact, self.task, plain=True)
            model, own = live.model, live.task.classes if live.task else ()
        started(student.model, model, self.way, name=artifact.ref, labels=own, source_labels=own)
        return replace(student, start=f"{self.way} of {artifact.ref}")


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
    args: dict[str, Any] = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in part.knobs.items()}
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
    return Student(model.requires_grad_(), replace(card, model_args=args), start)


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

"""Build a student from what a person typed: a zoo's network or model with its weights, or a timm architecture with random ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from timm.models import is_model
from torch import Tensor, nn

from vtzoo import knobs, talk
from vtzoo.artifact import HEADS, Artifact, described, open_ref
from vtzoo.backbone import build_card, create, sized, taking, timm_card
from vtzoo.classifier import head_names
from vtzoo.delta import HEAD
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state
from vtzoo.folding import imaging
from vtzoo.refs import is_path
from vtzoo.spec import BackboneCard, plain
from vtzoo.tensors import TensorFile, prefixed
from vtzoo.zoo import Zoo

Heads = Mapping[tuple[str, tuple[str, ...]], Mapping[str, Tensor]]
"""Classifiers by task and classes."""


@dataclass(frozen=True)
class Student:
    """A network to be trained, with all its parameters.

    Attributes:
        model: with a classifier where classes were asked for.
        card: of it, at its input size.
        start: "pretrained", "random", or from whom it has its first weights, and how.
        heads: classifiers that it brings along.
        search: what a search that found it reports.
    """

    model: nn.Module
    card: BackboneCard
    start: str
    heads: Heads = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


def build_student(text: str, zoo: Zoo, classes: int, pixels: int | None) -> Student:
    """Build it at its input size; of a dual encoder the image tower.

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
    part = knobs.arguments(text)
    args: dict[str, Any] = {k: _value(v) for k, v in part.knobs.items()}
    card, known, model = _found(part.name, zoo)
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
    args = {**card.model_args, **imaging(card), **sizing, **args}
    start = "pretrained" if pretrained else "random"
    talk.say(f"student {part.name} starts from {start} weights")
    if not pretrained:
        fresh = taking(card, side, lambda: create(card.arch, pretrained=False, num_classes=classes, **args))
        shape = replace(card.preprocess, crop_pct=1.0, crop_mode="center")
        made = BackboneCard(name=card.arch, arch=card.arch, model_args=args, preprocess=shape, head=head_names(fresh))
        return Student(fresh.requires_grad_(), made, start)
    weights, heads = (model.path, _heads(model)) if model else (None, {})
    made = taking(card, side, lambda: _pretrained(card, args, zoo, weights, classes))
    return Student(made.requires_grad_(), replace(card, model_args=args), start, heads)


def _value(text: Any) -> Any:
    """What an argument says: a number, a truth, a word, a list of them."""
    if isinstance(text, list):
        return [_value(item) for item in text]  # pyright: ignore[reportUnknownVariableType] - of a person's own text
    return yaml.safe_load(text) if isinstance(text, str) else text


def _heads(model: Artifact) -> Heads:
    """The classifiers of a plain model that has several."""
    files = model.files or {}
    stored = TensorFile(files[HEADS]) if HEADS in files else {}
    return {(t.name, t.classes): prefixed(stored, f"{HEAD}{t.name}/") for t in model.tasks if stored}


def _pretrained(card: BackboneCard, args: dict[str, Any], zoo: Zoo, weights: Path | None, classes: int) -> nn.Module:
    """Build with weights; refuses arguments that would leave some of them out or some of the network random."""
    refusal = ShapeMismatch(
        f"the weights of {card.name} do not fit {plain(args)}", "leave arguments out, or add pretrained=false to them"
    )
    try:
        model = build_card(card, zoo=zoo, weights=weights, num_classes=classes, **args)
    except RuntimeError as error:
        raise refusal from error
    own_args = {**card.model_args, **imaging(card)}
    if args != own_args:  # timm loads what has a name on both sides, and only logs the rest
        own = create(card.arch, pretrained=False, num_classes=0, **own_args)
        if set(base_state(model)) != set(base_state(own)):
            raise refusal
    return model


def _found(name: str, zoo: Zoo) -> tuple[BackboneCard, bool, Artifact | None]:
    """A student's card; whether its name stands for weights, which a bare architecture that is no entry's name doesn't; and the plain model that it is.

    Raises:
        NotFound: nothing is called so.
        UsageError: it is a delta or an export, or could be several.
    """
    if is_path(name):
        return _whole(open_ref(name, zoo))
    known = {e.section for e in zoo.entries() if e.name == name}
    if not known & {"models", "backbones"} and is_model(name) and "." not in name:
        return timm_card(name), False, None
    try:
        entry = zoo.resolve(name, "models" if "models" in known else "backbones" if "backbones" in known else None)
    except NotFound:
        if "@" in name:
            raise
        return timm_card(name), True, None
    if entry.section == "backbones":
        return BackboneCard.of(entry.name, entry.facts), True, None
    return _whole(open_ref(entry.pinned, zoo))


def _whole(model: Artifact) -> tuple[BackboneCard, bool, Artifact]:
    if model.files is None:
        raise UsageError(
            f"'{model.ref}' is a delta, and a student is a whole network",
            f"fold it first: vtzoo fold {model.ref} --out DIR, then --student ./DIR",
        )
    card, _ = described(model.files)
    return replace(card, name=model.name, source=f"object:sha256:{model.digest}"), True, model

"""What stands on a live model: the record that `inject` and `attach` leave, and the classifiers that they put in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.classifier import head_names
from vtzoo.delta import Delta, Part
from vtzoo.errors import UsageError
from vtzoo.masks import is_masked
from vtzoo.methods._protocol import check, resized
from vtzoo.methods._protocol import head as build_head
from vtzoo.spec import Task
from vtzoo.speech import can_speak, speaks
from vtzoo.tensors import fill, prefixed, shape_of
from vtzoo.text_head import Spoken, TextHead

INSTALLED = "_vtzoo_installed"


@dataclass
class Installed:
    """What stands on a live model: the resolved parts, and what detach must put back."""

    spec: str
    parts: list[Part]
    trainable_before: dict[str, bool] = field(default_factory=dict)
    heads_before: dict[str, nn.Module] = field(default_factory=dict)
    classes_before: int | None = None
    training_before: set[str] = field(default_factory=set[str])


def installed(model: nn.Module) -> Installed | None:
    """The delta on a model, if there is one."""
    return model.__dict__.get(INSTALLED)


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """The classifier's tensors under their timm names."""
    inside = tuple(h + "." for h in head_names(model))
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if inside and n.startswith(inside)}


def set_head(model: nn.Module, delta: Delta, task: str) -> None:
    """Give the model one task's classifier (the delta must be attached).

    Raises:
        Corrupt: the head holds numbers that mean nothing to it.
        ShapeMismatch: the head does not fit the backbone's features.
        UsageError: no delta is attached, or each task has a network of its own.
    """
    record = installed(model)
    if record is None:
        raise UsageError("attach the delta before choosing its head", "vtzoo.attach(model, delta)")
    if is_masked(delta):
        raise UsageError(
            f"{delta.method} keeps a network of its own for each task, not only a head",
            f"detach, then vtzoo.attach(model, delta, task={task!r})",
        )
    keep_heads(model, record)
    _plain_head(model, delta, delta.task(task))
    for part in delta.parts:
        swap_heads(model, record, part.module, part.config)
    names, tensors = head_names(model), delta.head(task)
    like = next((p for n, p in model.named_parameters() if not n.startswith(names)), None)
    for name in names:
        own = prefixed(tensors, f"{name}.")
        head = resized(model.get_submodule(name), {n: shape_of(own, n) for n in own})
        head.to(like.device if like is not None else None)
    fill(head_state(model), dict(tensors))
    for name in names:
        check(model.get_submodule(name))


def say(model: Any, parts: Sequence[Part], words: Sequence[str], templates: Sequence[str]) -> None:
    """Give a dual encoder, with all that hangs on it, the classifier of other class names, which has learned what the present one has.

    Raises:
        UsageError: what hangs on it knows its own classes only, or names or templates are no good.
    """
    own = [p.method for p in parts if any(s.facts.get("classes", 0) not in (0, len(words)) for s in p.sites)]
    record, learned = installed(model), dict(model.get_classifier().named_parameters())
    model.speak(words, templates)
    for part in parts if record is not None else ():
        swap_heads(model, record, part.module, part.config)  # type: ignore[arg-type] - told above
    head = model.get_classifier()
    if own or not isinstance(head, Spoken):
        who = own[0] if own else next(p.method for p in parts if hasattr(p.module, "head"))
        raise UsageError(
            f"{who} has learned its own classes, and has nothing to say of others",
            "use a method that learns a context for all of them, such as coop",
        )
    with torch.no_grad():
        for name, value in head.named_parameters():
            value.copy_(learned[name])


def _plain_head(model: Any, delta: Delta, task: Task) -> None:
    """A fresh classifier; of a dual encoder on whose text tower the delta acts, the one that this tower makes."""
    if can_speak(model) and any(speaks(p) for p in delta.parts):
        model.speak(task.spoken, task.templates)
    else:
        model.reset_classifier(len(task.classes))


def keep_heads(model: nn.Module, record: Installed) -> None:
    """Remember the classifier that was there, once."""
    if not record.heads_before:
        record.heads_before = {n: model.get_submodule(n) for n in head_names(model)}
        record.classes_before = getattr(model, "num_classes", None)


def swap_heads(model: nn.Module, record: Installed, module: Any, config: Any) -> tuple[str, ...]:
    """Let a method build its own classifier in place of timm's; gives the names of those it did."""
    swapped = list[str]()
    for name in head_names(model):
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear | TextHead) and (new := build_head(module, old, config)) is not None:
            keep_heads(model, record)
            model.set_submodule(name, new.to(old.weight.device, old.weight.dtype))
            swapped.append(name)
    return tuple(swapped)

"""What a method's module provides. Everything else (inject, attach, extract, fold, save) is shared.

    GROUP, PAPER     the survey's cell and the source
    Config           frozen dataclass of knobs
    sites(anatomy, config) -> sites where it acts; () for a method of the head only
    Graft(site, config)    the trainable child for one site; see vtzoo.graft.Graft
    Shared(sites, config)  optional: what the grafts of all sites have in common; they reach it as `self.shared`
    FAMILIES         optional: where it makes sense, a tuple of "tokens" and "maps"; both when absent
    RECIPE           optional: training defaults by backbone family, {"tokens": {...}, "maps": {...}}: lr, weight_decay, and
                     head_lr where the probe's does not suit the head
    TRAINS           optional, False where nothing is learned: what it says is made at once
    INTERMEDIATES    optional, False where what passes from block to block is not the backbone's tokens alone; see vtzoo.limits
    head(old, config)      optional: builds another classifier in place of timm's linear one, or of a text tower's (vtzoo.text_head)
    loss(model, config)    optional: (plain, seen) -> scalar, made once before a training: what is trained on in place of the plain loss that
                     the recipe makes, given that and what passed the classifier; see vtzoo.own_loss
    ONE_LABEL        optional, True where that loss is for images of one class each
    TELLS_ALL        optional, True where a text tower's classifier, though not linear, holds all that is needed without the tower
    fold_head(tensors, config) -> {…weight, …bias}      optional: a classifier's tensors as those of the one that it stands in for, where they are more
    prepare(head, config, features, labels)     optional: what that classifier takes of all training images before any training: the
                     features [n, width] that come into it, and labels [n]. Alone such a method may have nothing to train
    tune(head, config, features, labels)        optional, with a knob `search`: what it chooses by the validation images, after training
    fold(base, delta, sites, config) -> Folded      optional: where folding is more than `Graft.read` per site

A classifier whose file's shapes depend on the images has a method `resize(shapes)`, which makes room for tensors of these shapes, by name;
`check()`, where it has that, refuses what a file has put into it.

A graft whose `edits` is empty does not fold; the docstring's "Folds:" line is the reason that people read.

A method that composes others has neither sites nor Graft, but

    compose(model, config, batches, seed) -> a stack spec, which stands in its place before sites are resolved
    TRIAL                  knobs by which that takes next to no time, for whoever wants to know whether it fits
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft
from vtzoo.knobs import Part


class Method(Protocol):
    """The required part of a method that grafts; asserted for every file of the folder by the contract tests."""

    GROUP: str
    PAPER: str
    Config: type[Any]
    Graft: type[Graft]

    @staticmethod
    def sites(anatomy: Anatomy, config: Any, /) -> Sequence[Site]:
        """Where it acts on this backbone."""
        ...


def composes(method: Any) -> bool:
    """Whether a method finds a stack of others to put in its place."""
    return hasattr(method, "compose")


def trial(part: Part, method: Any) -> Part:
    """A part as whoever only wants to know whether it fits may ask for it: what composes a stack takes next to no time."""
    return (
        replace(part, knobs={**part.knobs, **{k: str(v) for k, v in method.TRIAL.items()}})
        if composes(method)
        else part
    )


def learns(method: Any) -> bool:
    """Whether there is something to train."""
    return getattr(method, "TRAINS", True)


def recipe(method: Any, family: str) -> Mapping[str, Any]:
    """A method's training defaults on a family of backbones ("tokens" or "maps")."""
    return getattr(method, "RECIPE", {}).get(family, {})


def head(method: Any, old: nn.Module, config: Any) -> nn.Module | None:
    """The classifier a method wants instead of timm's, or None."""
    build = getattr(method, "head", None)
    return build(old, config) if build else None


def prepares(method: Any) -> bool:
    """Whether a method's classifier is made of all training images."""
    return hasattr(method, "prepare")


def resized(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A classifier with room for tensors of these shapes, where it has as many numbers as images; any other as it is."""
    if hasattr(module, "resize"):
        module.resize(shapes)  # type: ignore[operator] - the protocol's
    return module


def check(module: nn.Module) -> None:
    """Let a classifier refuse what a file has put into it.

    Raises:
        Corrupt: it is no such classifier's.
    """
    if hasattr(module, "check"):
        module.check()  # type: ignore[operator] - the protocol's

"""The loss that a method brings (its `loss` hook), put around the plain one that a recipe makes.

A method sees the plain loss as it comes, label smoothing, class weights and mixed images included, and what passed the classifier in
that very step; so it goes with whatever the recipe does, and with features that were computed once (see `vtzoo.prefix`).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtzoo.classifier import head_names
from vtzoo.delta import Part
from vtzoo.errors import UsageError
from vtzoo.text_head import TextHead

Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
Own = Callable[[Tensor, "Seen"], Tensor]


@dataclass(frozen=True)
class Seen:
    """What passed the classifier in a step.

    Attributes:
        features: that came into it, [n, ...].
        logits: that it gave, [n, classes].
        head: the classifier. What a `TextHead` makes of class names is made once in a step, gradients and all: `head.layer()`.
    """

    features: Tensor
    logits: Tensor
    head: nn.Module


def check(parts: Sequence[Part], *, several: bool) -> None:
    """Refuse what can't be trained on.

    Args:
        parts: of the stack.
        several: images have several labels each.

    Raises:
        UsageError: two parts bring a loss, or one that is for images of one class.
    """
    bringing = [p for p in parts if hasattr(p.module, "loss")]
    if len(bringing) > 1:
        names = " and ".join(p.method for p in bringing)
        raise UsageError(f"{names} would each be trained on a loss of its own", "name one")
    if several and (strict := [p.method for p in bringing if getattr(p.module, "ONE_LABEL", False)]):
        raise UsageError(f"{strict[0]} is for images of one class each, and an image here has several", "use coop")


def around(plain: Loss, model: nn.Module, parts: Sequence[Part]) -> Loss:
    """The plain loss, or what the one part makes of it that brings a loss."""
    part = next((p for p in parts if hasattr(p.module, "loss")), None)
    if part is None:
        return plain
    name, own = head_names(model)[0], part.module.loss(model, part.config)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with _watched(model.get_submodule(name)) as seen:
            value = plain(model, batch)
            return own(value, seen[-1])

    return loss


@contextmanager
def _watched(head: nn.Module) -> Generator[list[Seen]]:
    seen: list[Seen] = []

    def note(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        seen.append(Seen(args[0], logits, module))

    hook = head.register_forward_hook(note)
    try:
        with head.once() if isinstance(head, TextHead) else nullcontext():
            yield seen
    finally:
        hook.remove()

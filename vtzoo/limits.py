"""What a model can't do as long as it carries certain deltas: refused in words, where it would compute something else.

A site with the fact `grid` has a method that knows each patch by its place: it takes images of one size only. A method's
file that says `INTERMEDIATES = False` puts tokens or images of its own between the blocks, and timm's `forward_intermediates`
would take them for the backbone's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from vtzoo.anatomy import Anatomy
from vtzoo.delta import Part
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.graft import Graft, graft

_INTERMEDIATES = "forward_intermediates"


class OneSize(Graft):
    """At the layer that sees the pixels: images of another size are refused."""

    def __init__(self, size: Sequence[int], methods: str) -> None:
        super().__init__()
        self.size, self.methods = tuple(size), methods

    def enter(self, x: Tensor) -> Tensor:
        """Compare.

        Raises:
            ShapeMismatch: another size.
        """
        if tuple(x.shape[2:]) != self.size:
            made, seen = ("x".join(map(str, s)) for s in (self.size, x.shape[2:]))
            raise ShapeMismatch(
                f"{self.methods} was made for images of {made} pixels, since it knows each patch by its place, and these have {seen}",
                "build the model for that size and train there, or use a method without a grid, such as lora",
            )
        return x


def limit(model: nn.Module, parts: Sequence[Part], anatomy: Anatomy) -> None:
    """Set what the parts that hang on a model want refused; what is grafted goes with `prune`, the rest with `free`."""
    if placed := [p.method for p in parts if any("grid" in s.facts for s in p.sites)]:
        size = anatomy.seen[anatomy.stem].x[2:]
        graft(model.get_submodule(anatomy.stem), "one_size", OneSize(size, " and ".join(placed)))
    mixed = [p.method for p in parts if not getattr(p.module, "INTERMEDIATES", True)]
    if mixed and hasattr(model, _INTERMEDIATES) and _INTERMEDIATES not in model.__dict__:
        model.__dict__[_INTERMEDIATES] = partial(_refuse, " and ".join(mixed))


def free(model: nn.Module) -> None:
    """Let a model again do what `limit` took from it."""
    if getattr(model.__dict__.get(_INTERMEDIATES), "func", None) is _refuse:
        del model.__dict__[_INTERMEDIATES]


def _refuse(methods: str, *_: Any, **__: Any) -> NoReturn:
    raise UsageError(
        f"{methods} puts something of its own between the blocks, so what they give is not the backbone's features alone",
        "call forward_features, fold the delta where it folds, or use a method such as lora",
    )

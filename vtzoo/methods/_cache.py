"""Shared by the classifiers that remember the training images: keys, labels, and the search for how much they say.

    logits = W f + b + alpha exp(-beta (1 - f K')) V,   f normalised

K are the training images' normalised features, V their labels as rows of zeros with one 1. W and b are what a text tower makes of class
names, or are made of the same features: class means, or a ridge classifier (see `vtzoo.heads`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import talk
from vtzoo.errors import Corrupt
from vtzoo.heads import classifier
from vtzoo.methods._features import layer
from vtzoo.text_head import TextHead

SEARCHED = {"beta": (0.1, 7.0, 200), "alpha": (0.1, 3.0, 20)}
"""From where to where the search goes, in how many steps (Tip-Adapter's code, for ImageNet)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """Knobs of what the images say.

    Attributes:
        alpha: how much they say beside the classifier.
        beta: how fast an image's word fades with its distance.
        search: choose these by the validation images, once all is trained: of `vtzoo train` alone.
        head: the classifier beside them: prototype (class means) or linear (ridge); what the text tower says, where there is one, unless given.
        scale: of a prototype's logits, which are cosines.
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(gt=0)] = 5.5
    search: bool = False
    head: Literal["prototype", "linear"] | None = None
    scale: Annotated[float, Field(gt=0)] = 100.0


class Cache(nn.Module):
    """A classifier, and one made of kept images beside it.

    Args:
        old: the classifier that was there.
        config: see `Knobs`.
        width: of a key; the features' unless given.
        trained: whether the keys are.

    Attributes:
        rows: names of the tensors that have a row for each image.
    """

    rows: tuple[str, ...] = ("keys", "labels")
    weight: Tensor
    bias: Tensor
    keys: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, old: nn.Linear | TextHead, config: Knobs, width: int | None = None, *, trained: bool = False
    ) -> None:
        super().__init__()
        self.told = isinstance(old, TextHead)
        weight, bias = layer(old)
        keys = weight.new_zeros(0, width or old.in_features)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int32, device=weight.device))
        self.register_buffer("alpha", weight.new_full((), config.alpha))
        self.register_buffer("beta", weight.new_full((), config.beta))
        if trained:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for as many images as these labels are."""
        for name in self.rows:
            old = getattr(self, name)
            made = old.new_zeros((*shapes.get("labels", ())[:1], *old.shape[1:]))
            setattr(self, name, nn.Parameter(made) if isinstance(old, nn.Parameter) else made)

    def check(self) -> None:
        """Refuse images of classes that there are not.

        Raises:
            Corrupt: the first such.
        """
        within(self.labels, len(self.weight), "an image is of class")

    def base(self, features: Tensor) -> Tensor:
        """What the classifier says of normalised features, without the images [n, classes]."""
        return F.linear(features, self.weight, self.bias)

    def likeness(self, features: Tensor) -> Tensor:
        """Of normalised features to the images [n, images]."""
        return features @ self.keys.mT

    def values(self) -> Tensor:
        """What each image says of the classes [images, classes]."""
        return F.one_hot(self.labels.long(), len(self.weight)).to(self.weight.dtype)

    def choices(self) -> Iterator[tuple[dict[str, float], Tensor]]:
        """What the search may put beside alpha and beta, and the values with it."""
        yield {}, self.values()

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, classes]."""
        features = F.normalize(x, dim=-1)
        near = torch.exp(-self.beta * (1 - self.likeness(features)))
        return self.base(features) + self.alpha * (near @ self.values())


def within(places: Tensor, count: int, what: str) -> None:
    """Refuse places, of a file, of which there are no such.

    Raises:
        Corrupt: says which.
    """
    odd = places[(places < 0) | (places >= count)]
    if len(odd):
        raise Corrupt(f"{what} {int(odd[0])}, and there are {count}", "fetch it or make it again")


@torch.no_grad()
def remembered(head: Cache, config: Knobs, features: Tensor, labels: Tensor) -> Tensor:
    """Make room for images and keep their labels; make the classifier of them where no text tower has told one.

    Gives their normalised features [n, width], which are the keys unless a method makes others of them.
    """
    unit = F.normalize(features, dim=-1).to(head.weight.dtype)
    head.resize({"labels": (len(unit),)})
    head.labels.copy_(labels)
    if config.head == "linear":
        for place, value in zip(
            (head.weight, head.bias), classifier(unit.float(), labels, len(head.weight)), strict=True
        ):
            place.copy_(value)
    elif config.head == "prototype" or not head.told:
        means = torch.zeros_like(head.weight).index_add_(0, labels, unit)
        head.weight.copy_(config.scale * F.normalize(means, dim=-1))
        head.bias.zero_()
    return unit


@torch.no_grad()
def prepare(head: Cache, config: Knobs, features: Tensor, labels: Tensor) -> None:
    """Keep images [n, width] with their labels [n]."""
    unit = remembered(head, config, features, labels)
    head.keys.copy_(unit)


def grid(start: float, end: float, steps: int) -> list[float]:
    """The values that a search tries; the end is left out, as in the authors' code."""
    return [start + i * (end - start) / steps for i in range(steps)]


@torch.no_grad()
def tune(head: Cache, config: Any, features: Tensor, labels: Tensor) -> None:  # noqa: ARG001 - the interface
    """Choose alpha and beta (and what a method adds) by top-1 on validation images [n, width]; of the best the first."""
    unit = F.normalize(features, dim=-1)
    likeness, base = head.likeness(unit), head.base(unit)
    best, found = -1, dict[str, float]()
    for beta in grid(*SEARCHED["beta"]):
        near = torch.exp(-beta * (1 - likeness))
        for more, values in head.choices():
            said = near @ values
            for alpha in grid(*SEARCHED["alpha"]):
                right = int(((base + alpha * said).argmax(-1) == labels).sum())
                if right > best:
                    best, found = right, {"alpha": alpha, "beta": beta, **more}
    for name, value in found.items():
        getattr(head, name).fill_(value)
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    talk.say(f"{chosen}: {best} of {len(labels)} validation images are right")

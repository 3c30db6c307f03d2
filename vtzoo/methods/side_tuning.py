"""Side-tuning: a small network on the pixels, blended with the frozen features (Zhang et al. 2020, arXiv:1912.13503, sec. 3).

    R = alpha * B(x) + (1 - alpha) * S(x),   alpha = sigmoid(a),   S = linear(mean(conv, conv, conv, conv (x)))

B is the backbone as far as its pooling, S(x) one vector per image, the same at every place of B(x).
Shapes: S's convolutions 8x8 stride 4, 3x3 stride 2, 3x3 stride 2, 3x3, of width, 2, 4 and 4 times width channels, each
followed by a group norm and ReLU; its linear [channels, 4 * width]; a [1], 0 at the start unless told otherwise.
Folds: no: a second network looks at the pixels, which no stock architecture has.  Identity at init: no.
Parameters: 64 * c * w + 234 * w^2 + 22 * w + (4 * w + 1) * channels + 1, c channels of the image, w = width.
Departs from the paper: S starts at random and is not distilled from B first; one vector in place of a map, so that every
family has it; its layers after FCN5 of the paper's public code, narrower and without the skip; a learns 10 times
as fast as S.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._bottleneck import channels
from vtzoo.methods._side import Carrier, convolution, ending, joined, placed

GROUP = "adapter/parallel"
PAPER = "arXiv:1912.13503"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
RATE = 10.0  # of alpha, which could not leave its start in a short training


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        width: channels of the side network's first layer.
        alpha: share of the backbone at the start.
    """

    width: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """The layer that is given the pixels, and the end of the features."""
    return joined([anatomy.module(anatomy.stem)], ending(anatomy))


class Shared(Carrier):
    """S and alpha."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        stem, end = sites
        w = config.width
        sizes = (
            (stem.facts["x"][0], w, 8, 4, 2),
            (w, 2 * w, 3, 2, 1),
            (2 * w, 4 * w, 3, 2, 1),
            (4 * w, 4 * w, 3, 1, 1),
        )
        self.net = nn.Sequential(*(convolution(*s) for s in sizes))
        self.out = nn.Linear(4 * w, channels(end))
        self.a = nn.Parameter(torch.full((1,), math.log(config.alpha / (1 - config.alpha))))
        self.rates = {"a": RATE}

    def side(self, x: Tensor) -> Tensor:
        """S of pixels [batch, c, h, w], [batch, channels]."""
        return self.out(self.net(x).mean((2, 3)))


class Graft(graft.Graft):
    """Catches the pixels, or blends at the end; without tensors of its own."""

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - the interface
        super().__init__()
        self.end, self.axis = "end" in site.facts, site.facts.get("axis", 1)

    def enter(self, x: Tensor) -> Tensor:
        """Keep the pixels."""
        if not self.end:
            self.shared.put(x)
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Blend the features with S."""
        if not self.end:
            return y
        alpha = torch.sigmoid(self.shared.a)
        return alpha * y + (1 - alpha) * placed(self.shared.side(self.shared.take()), y, self.axis)

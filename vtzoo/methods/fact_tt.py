"""FacT-TT: a tensor train over all layers' weights, two factors shared by all (Jie & Deng 2022, arXiv:2212.03145).

    y = W x + b + scale * V S U x        fold:  W' = W + scale * V S U   for each tile of W

A tile is a square of W as wide as its smaller side: three of a fused qkv, one of proj, four each of fc1 and fc2.
Shapes: U [rank, width] and V [width, rank] shared by all tiles of that width; S [down, across, places, rank, rank] per
layer, its tiles along outputs, inputs and kernel. U starts uniform in +- 1 / sqrt(width), S in +- 1 / sqrt(across * places *
rank), as linear layers do, V at zero.
Folds: exactly.  Identity at init: yes.
Parameters: 2 * rank * width for each width, rank^2 per tile.
Departs from the paper: the scale, which its code tunes for each task from 0.01 to 100, is 1, the rank 16 (there tuned, 16 at
most). A layer whose larger side is no multiple of its smaller one (a gated MLP's), or whose smaller side is less than twice
the rank, is one rectangular tile; a width below the rank takes rank = width. U and V are shared by width (in place of
factors for each stage of a Swin). A convolution has tiles for each place of its kernel and is edited as it is read, like a
linear that is read and never called; both without dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._fact import Factors, Tiled

GROUP = "parameter/weight"
PAPER = "arXiv:2212.03145"
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
Shared = Factors


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of the train, on both sides of a core.
        scale: factor of the increment.
        dropout: before V while training (called linears only).
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Graft(Tiled):
    """The cores of one layer."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config)
        t = self.tiles
        bound = (t.across * t.places * t.rank_in) ** -0.5
        core = torch.empty(t.down, t.across, t.places, t.rank_out, t.rank_in)
        self.core = nn.Parameter(core.uniform_(-bound, bound))

    def cores(self) -> Tensor:
        """As they are."""
        return self.core

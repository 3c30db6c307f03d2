"""FacT-TK: a Tucker decomposition of all layers' weights, its core shared too (Jie & Deng 2022, arXiv:2212.03145).

    y = W x + b + scale * V S U x,  S = sum_t p_t C_t        fold:  W' = W + scale * V S U   for each tile of W

A tile is a square of W as wide as its smaller side: three of a fused qkv, one of proj, four each of fc1 and fc2.
Shapes: U [rank, width] and V [width, rank] shared by all tiles of that width, C [rank, rank, rank] by all; p [down,
across, places, rank] per layer, its tiles along outputs, inputs and kernel. U starts uniform in +- 1 / sqrt(width), V at
zero, C and p Xavier-uniform (p as one matrix over the tiles of all layers).
Folds: exactly.  Identity at init: yes.
Parameters: 2 * rank * width for each width, rank^3 once, rank per tile.
Departs from the paper: the scale, which its code tunes for each task from 0.01 to 100, is 1, the rank that code's 32. A
layer whose larger side is no multiple of its smaller one (a gated MLP's), or whose smaller side is less than twice the
rank, is one rectangular tile; a width below the rank takes rank = width. U and V are shared by width (in place of factors
for each stage of a Swin), C by all widths: a narrow tile takes its first rows and columns. A convolution has tiles for each
place of its kernel and is edited as it is read, like a linear that is read and never called; both without dropout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Scores
from vtzoo.methods._fact import Factors, Tiled, cut

GROUP = "parameter/weight"
PAPER = "arXiv:2212.03145"
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of the decomposition, along all three sides of the core.
        scale: factor of the increment.
        dropout: before V while training (called linears only).
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 32
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Shared(Factors):
    """U and V of each width, C of all tiles, and how many these are."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__(sites, config)
        self.C = nn.Parameter(nn.init.xavier_uniform_(torch.empty(config.rank, config.rank, config.rank)))
        self.count = sum(math.prod(cut(s, config.rank)[:3]) for s in sites)


class Graft(Tiled):
    """What each tile of one layer takes of the shared core."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config)
        self.p = nn.Parameter(torch.zeros(*self.tiles[:3], config.rank))

    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """Xavier's bound counts the tiles of all layers."""
        bound = (6 / (self.p.shape[-1] + self.shared.count)) ** 0.5
        nn.init.uniform_(self.p, -bound, bound)

    def cores(self) -> Tensor:
        """The shared core along each tile's p."""
        core: Tensor = self.shared.C[: self.tiles.rank_out, : self.tiles.rank_in]
        return torch.einsum("dakt,oit->dakoi", self.p, core)

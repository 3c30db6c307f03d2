"""Convpass: convolutional bypasses beside attention and MLP (Jie & Deng 2022, arXiv:2207.07039).

    y = f(x) + scale * (U a(K * a(D x + d) + k) + u),   a(z) = z sigmoid(1.702 z),   K a 3x3 convolution

over the tokens as the map of patches that they are; the class token, and each register, as a map of one place.
Shapes: D [rank, channels], d [rank], K [rank, rank, 3, 3], k [rank], U [channels, rank], u [channels].
Folds: no: activations stand between its matrices.  Identity at init: yes (D Xavier-uniform, K the identity at its
centre, U and the biases zero).
Parameters: 2 * rank * channels + rank + channels + 9 * rank^2 + rank per bypass, two bypasses per block.
Departs from the paper: a layer scale after the attention or MLP covers the bypass too. A Mixer's token MLP counts as
attention; where a block has neither (ResNet, EfficientNet) the bypass stands beside the whole block if that keeps its
shape. Where attention works in windows (Swin) the bypass sees the whole map, as in the authors' code; in Swin V2 from the
block's input to behind the norm. CaiT's class-attention blocks carry no patches and have none. Relied on: the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import ATTENTION, MLP, hosts
from vtzoo.methods._branches import beside_attention, enclosing, windowed
from vtzoo.methods._maps import Mapped, Notes, lay

GROUP = "adapter/parallel"
PAPER = "arXiv:2207.07039"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}
Shared = Notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bypass.
        scale: factor of the bypass; the paper chooses among 0.01 … 100 for each task.
        dropout: before the last matrix while training.
        attention_only: leave the MLPs alone, as the paper's Convpass_attn does.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    attention_only: bool = False


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The attentions and MLPs of the blocks, or the blocks that keep their shape."""
    wanted: list[Site] = []
    windows: list[Site] = []
    for site in hosts(anatomy, *((ATTENTION,) if config.attention_only else (ATTENTION, MLP))):
        block = enclosing(anatomy, site)
        if site.last in ATTENTION and windowed(anatomy, site, block):
            windows.append(block)
        elif tuple(site.facts["x"]) == site.shape:
            wanted.append(site)
    beside = beside_attention(anatomy, windows).values()
    found = lay(anatomy, [*wanted, *(end for end, _ in beside)], [keeper for _, keeper in beside])
    if not found:
        raise UsageError(
            "no block of this backbone has an attention or MLP as its own part, or keeps its shape, for an adapter to stand beside",
            "use adapter or lora instead",
        )
    return found


class Graft(Mapped):
    """A bypass from a module's input to its output."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        if self.bare:
            return
        rank, self.scale, self.dropout = config.rank, config.scale, config.dropout
        self.down, self.down_bias = nn.Parameter(torch.empty(rank, self.channels)), nn.Parameter(torch.zeros(rank))
        self.kernel, self.kernel_bias = nn.Parameter(torch.zeros(rank, rank, 3, 3)), nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(self.channels, rank))
        self.up_bias = nn.Parameter(torch.zeros(self.channels))
        nn.init.xavier_uniform_(self.down)
        nn.init.dirac_(self.kernel)

    def act(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bypass of the input."""
        given = self.given(x, y)
        return (
            y if given is None else y + self.scale * self._bypass(given.movedim(self.axis, -1)).movedim(-1, self.axis)
        )

    def _bypass(self, x: Tensor) -> Tensor:
        """[..., channels] -> the same."""
        hidden = _quick_gelu(F.linear(x, self.down, self.down_bias))
        hidden = self.spread(hidden, lambda z: F.conv2d(z, self.kernel, self.kernel_bias, padding=1))
        hidden = F.dropout(_quick_gelu(hidden), self.dropout, self.training)
        return F.linear(hidden, self.up, self.up_bias)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)

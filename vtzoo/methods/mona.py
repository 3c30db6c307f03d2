"""Mona: adapters with depthwise filters of three sizes (Yin et al. 2024, arXiv:2408.08345).

    z = gamma * LN(x) + gammax * x                       h = D z + d
    h' = h + (K3 * h + K5 * h + K7 * h) / 3              h" = h' + P h' + p              y = x + U gelu(h") + u

K3, K5, K7 depthwise, over the tokens as the map of patches that they are. One stands behind the attention's residual, one
behind the MLP's.
Shapes: gamma, gammax, and LN's weight and bias [channels]; D [rank, channels], d [rank]; K [rank, 1, k, k] with a bias
[rank] each; P [rank, rank], p [rank]; U [channels, rank], u [channels].
Folds: no: a norm and an activation stand inside.  Identity at init: yes (gamma starts at 1e-6, gammax at 1, the
convolutions as torch draws them, D ~ truncated N(0, 0.02), U and the biases of D, U zero).
Parameters: 2 * rank * channels + 5 * channels + rank^2 + 88 * rank per adapter: D, U and their biases, the norm and its two
scales, 9 + 25 + 49 numbers and three biases per filter channel, P and p.
Departs from the paper: U starts at zero, not like D. The paper has maps alone (Swin): class and register tokens pass the
filters as maps of one place. A block without attention and MLP (ResNet, ConvNeXt, MaxViT), or one that scales its residual
(CAFormer's last stages), has the adapter behind it alone. CaiT's class-attention blocks carry no patches and have none.
Relied on: the authors' code.
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
from vtzoo.methods._bottleneck import at
from vtzoo.methods._branches import branches
from vtzoo.methods._maps import Mapped, Notes, lay

GROUP = "adapter/sequential"
PAPER = "arXiv:2408.08345"
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
SIZES = (3, 5, 7)
Shared = Notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the adapter.
        dropout: before the last matrix while training.
    """

    rank: Annotated[int, Field(ge=1)] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """Every block's output, and where its attention's branch ends."""
    ends = branches(anatomy, anatomy.blocks)
    wanted: list[Site] = []
    more: list[Site] = []
    for block in anatomy.blocks:
        axis = anatomy.channel_axis(block.name)
        if block.name in ends:
            start, end = ends[block.name]
            wanted.append(anatomy.module(end, axis=axis, source=start))
            more.append(anatomy.module(start, axis=axis, keeps="x", bare=True))
        wanted.append(at(anatomy, block.name))
    if not wanted:
        raise UsageError("this backbone has no numbered blocks for an adapter to follow", "use lora or ssf instead")
    return lay(anatomy, wanted, more)


class Graft(Mapped):
    """An adapter on the sum behind a branch."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        if self.bare:
            return
        rank, channels, self.dropout = config.rank, self.channels, config.dropout
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.gamma, self.gammax = nn.Parameter(torch.full((channels,), 1e-6)), nn.Parameter(torch.ones(channels))
        self.down, self.down_bias = nn.Parameter(torch.empty(rank, channels)), nn.Parameter(torch.zeros(rank))
        self.up, self.up_bias = nn.Parameter(torch.zeros(channels, rank)), nn.Parameter(torch.zeros(channels))
        self.filters = nn.ModuleList(nn.Conv2d(rank, rank, k, padding=k // 2, groups=rank) for k in SIZES)
        self.mix = nn.Conv2d(rank, rank, 1)
        nn.init.trunc_normal_(self.down, std=0.02)

    def act(self, x: Tensor, y: Tensor) -> Tensor:
        """Pass what the output is, or is about to be added to, through the adapter."""
        if not self.source:
            return y + self._adapter(y)
        before = self.given(x, y)
        return y if before is None else y + self._adapter(before + y)

    def _adapter(self, x: Tensor) -> Tensor:
        """What is added to x."""
        x = x.movedim(self.axis, -1)
        x = self.gamma * F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias) + self.gammax * x
        hidden = self.spread(F.linear(x, self.down, self.down_bias), self._filter)
        hidden = F.dropout(F.gelu(hidden), self.dropout, self.training)
        return F.linear(hidden, self.up, self.up_bias).movedim(-1, self.axis)

    def _filter(self, z: Tensor) -> Tensor:
        """The mean of the depthwise filters, as one kernel, and the 1x1 convolution, each beside the identity, on maps."""
        widest = SIZES[-1]
        own = dict(self.filters.named_parameters())
        kernels = [F.pad(own[f"{i}.weight"], [(widest - k) // 2] * 4) for i, k in enumerate(SIZES)]
        kernel, bias = torch.stack(kernels).mean(0), torch.stack([own[f"{i}.bias"] for i in range(len(SIZES))]).mean(0)
        z = z + F.conv2d(z, kernel, bias, padding=widest // 2, groups=len(kernel))
        return z + self.mix(z)

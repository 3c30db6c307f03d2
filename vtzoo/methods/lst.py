"""LST: a ladder of thin blocks beside the backbone, fed by its blocks' outputs (Sung et al. 2022, arXiv:2206.06522, sec. 3.2).

    h_0 = D_0 x_0,   h_i = rung_i(mu_i h_{i-1} + (1 - mu_i) D_i x_i),   mu_i = sigmoid(a_i / 0.1)
    features + U norm(h_L)                         x_0 what the first block is given, x_i what block i gives

Shapes: d = max(8, channels // reduction); D_i [d, channels], a_i [1] zero; on sequences a rung is a transformer block
of width d and MLP width 4 d, on maps a depthwise 7x7 convolution and the same MLP; U [channels of the features, d].
Folds: no: the ladder is a second network beside the backbone.  Identity at init: yes (U zero); with join=replace, no.
Parameters: per block d * channels + d + 1 + 12 d^2 + 13 d (maps: 8 d^2 + 57 d), and once per run of blocks of one shape
d * channels + d for D_0, 2 d for the norm, (d + 1) * channels for U.
Trained alone it needs no backpropagation through any block: only what follows the features (pooling, at times a last
convolution) is in the gradient's way.
Departs from the paper: U norm(h_L) is added to the backbone's own features, which a fresh classifier can use at once;
join=replace takes it alone, as the paper does. Where channels or places change along the way (Swin, convolutional
networks) a new ladder begins, and all are added up at the end, each by its mean where its places are not the features';
it begins at its first block's output, without a gate, where that block changes the shape. Rungs start at random; the
paper prunes them from the backbone's weights, here no two families would prune alike. The gate, its start and the 0.1
are those of the paper's public code, which has biases in D and U.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import channels
from vtzoo.methods._side import MAP, Carrier, aligned, ending, joined, keeps, placed, places, silent, whole

GROUP = "adapter/parallel"
PAPER = "arXiv:2206.06522"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
TEMPERATURE, RATIO, LEAST = 0.1, 4, 8
Shared = Carrier


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        reduction: how many times narrower than the backbone the ladder is; never below 8 channels.
        heads: of a rung's attention; as many as divide its width.
        join: add what the ladder gives to the features, or replace them.
    """

    reduction: Annotated[int, Field(ge=1)] = 8
    heads: Annotated[int, Field(ge=1)] = 4
    join: Literal["add", "replace"] = "add"


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """Every block, and the end of the features.

    Raises:
        UsageError: there are no blocks.
    """
    blocks, end = whole(anatomy), ending(anatomy)
    if not blocks:
        raise UsageError("this backbone has no numbered blocks for a ladder to lean on", "use lora or ssf instead")
    found: list[Site] = []
    for _, group in groupby(blocks, lambda s: (s.shape, s.facts["axis"])):
        run = list(group)
        for site in run:
            facts = {"opens": site is blocks[0], "starts": site is run[0], "gated": site is not run[0] or keeps(site)}
            if site is run[-1]:
                facts |= {"out": channels(end), "mean": places(site) != places(end)}
            found.append(replace(site, facts={**site.facts, **facts}))
    return joined(found, end)


class Attention(nn.Module):
    """A rung's mixing of a sequence's places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = math.gcd(heads, width)
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, n, d] -> [batch, n, d]."""
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Conv(nn.Module):
    """A rung's mixing of a map's places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, h, w, d] -> [batch, h, w, d]."""
        return h + self.conv(h.movedim(-1, 1)).movedim(1, -1)


class Out(nn.Module):
    """The way from a ladder to the features: place by place, or by the mean of all."""

    def __init__(self, width: int, channels: int, config: Config, *, mean: bool) -> None:
        super().__init__()
        self.mean, self.norm = mean, nn.LayerNorm(width)
        self.up = silent(width, channels) if config.join == "add" else nn.Linear(width, channels)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, …, d] -> [batch, …, channels], or [batch, channels]."""
        h = self.norm(h)
        return self.up(h.flatten(1, -2).mean(1) if self.mean else h)


class Graft(graft.Graft):
    """One rung; at the end of its ladder the way out, and at the end of the features the sum of all."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        facts = site.facts
        self.axis, self.end, self.alone = facts["axis"], "end" in facts, config.join == "replace"
        self.before: int = facts["before"]
        self.rung, self.opens, self.starts = "starts" in facts, facts.get("opens"), facts.get("starts")
        if self.rung:
            self._climb(site, config)

    def _climb(self, site: Site, config: Config) -> None:
        c, facts = channels(site), site.facts
        d = max(LEAST, c // config.reduction)
        self.gate = nn.Parameter(torch.zeros(1)) if facts["gated"] else None
        self.first = nn.Linear(c, d) if self.starts and facts["gated"] else None
        self.down = nn.Linear(c, d)
        self.mix = Conv(d) if len(site.shape) + 1 == MAP else Attention(d, config.heads)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, RATIO * d), nn.GELU(), nn.Linear(RATIO * d, d))
        self.out = Out(d, facts["out"], config, mean=facts["mean"]) if "out" in facts else None

    def enter(self, x: Tensor) -> Tensor:
        """Begin a ladder at its first block's input."""
        if self.starts:
            ways = () if self.opens else self.shared.take()[1]
            self.shared.put((None if self.first is None else self.first(x.movedim(self.axis, -1)), ways))
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Climb a rung with the block's output; at the end add what all ladders gave."""
        if self.rung:
            h, ways = self.shared.take()
            h = self._rung(h, self.down(y.movedim(self.axis, -1)))
            self.shared.put((h, ways if self.out is None else (*ways, self.out(h))))
        if not self.end:
            return y
        parts = [placed(v, y, self.axis) for v in self.shared.take()[1]]
        return sum(parts, torch.zeros_like(y) if self.alone else y)

    def _rung(self, h: Tensor, z: Tensor) -> Tensor:
        if self.gate is not None:
            mu = torch.sigmoid(self.gate / TEMPERATURE)
            z = mu * aligned(h, z, self.before) + (1 - mu) * z
        z = self.mix(z)
        return z + self.mlp(z)

"""Shared by the methods that add a small non-linear branch: down, activation and up along a module's channels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft
from vtzoo.lean import thin

ATTENTION = ("attn", "attention", "self_attn", "token_mixer", "mlp_tokens", "linear_tokens")
MLP = ("mlp", "mlp_channels", "ffn")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def at(anatomy: Anatomy, name: str) -> Site:
    """A called module as a site that knows its channel axis."""
    return anatomy.module(name, axis=anatomy.channel_axis(name))


def hosts(anatomy: Anatomy, *kinds: Sequence[str]) -> list[Site]:
    """In each block its first child of each kind (a list of names); the block itself where it has none of any."""
    found: list[Site] = []
    for block in anatomy.blocks:
        inside = (anatomy.within(block.name, *names) for names in kinds)
        found += [at(anatomy, n) for n in inside if n is not None and anatomy.seen[n].y] or [at(anatomy, block.name)]
    return found


def channels(site: Site) -> int:
    """How many there are in the output of a site that knows their axis."""
    axis: int = site.facts["axis"]
    return site.shape[-1 if axis == -1 else axis - 1]


class Bottleneck(Graft):
    """up(act(down(x))) with weights down [rank, channels], up [channels, rank] and their biases."""

    def __init__(self, site: Site, rank: int, act: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.axis: int = site.facts["axis"]
        self.act, self.dropout = act, dropout
        width = self.channels = channels(site)
        self.down, self.down_bias = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(rank))
        self.up, self.up_bias = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.zeros(width))

    def branch(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Same shape as x; every position by itself, every channel times its scale [channels] or one for all, where there is any."""
        x = x if self.axis == -1 else x.movedim(self.axis, -1)  # a view would hide from `thin` what made it
        hidden = ACTIVATIONS[self.act](thin(x, self.down, self.down_bias))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        up, bias = (self.up, self.up_bias) if scale is None else (scale.reshape(-1, 1) * self.up, scale * self.up_bias)
        return F.linear(hidden, up, bias).movedim(-1, self.axis)

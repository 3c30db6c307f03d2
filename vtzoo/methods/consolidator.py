"""Consolidator: a grouped layer beside each layer, on shuffled channels (Hao et al. 2023, arXiv:2305.00603).

    y = W x + b + grouped(shuffle(x)),    grouped: U in `groups` blocks, and u

fold:  W' = W + U spread over the places that its blocks have behind the shuffle,   b' = b + u
Shapes: U [out, in/groups, kh, kw], u [out] (stored as `bias`). shuffle deals the inputs out to the blocks in turn, as
ShuffleNet does. Both start uniform in +- 0.001.
Folds: exactly.  Identity at init: nearly (the paper's +- 0.001).
Parameters: out * in / groups per layer, out more where it has a bias.
Departs from the paper: one grouped branch (it allows several, added up before storage). groups is by default half of
the layer's narrower side, which is its 384 on a ViT-B. Where a layer has no bias u is left out (a fold may not add
tensors). A grouped convolution has blocks inside each of its groups. Path dropout acts in called linears, and costs a
second product as large as the layer's; without it, and in convolutions and linears that are read, the weight is edited. Order of the shuffle and start from the authors'
code, github.com/THU-MIG/Consolidator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before

GROUP = "adapter/mix"
PAPER = "arXiv:2305.00603"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-2}, "maps": {"lr": 1e-3, "weight_decay": 1e-2}}
START = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        groups: blocks of U, or the most below that divide inputs and outputs; None is half of the narrower side.
        drop_path: chance that an image skips the branch while training (called linears only).
        targets: sites by role, name or glob.
    """

    groups: Annotated[int, Field(ge=1)] | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


def _blocks(site: Site, config: Config) -> int:
    """How many blocks a layer's U has (a grouped convolution's, in each of its groups)."""
    out, fan_in = site.shape[0] // int(site.facts.get("groups", 1)), site.shape[1]
    wanted = config.groups or max(1, min(out, fan_in) // 2)
    return next(g for g in range(wanted, 0, -1) if math.gcd(out, fan_in) % g == 0)


class Graft(graft.Graft):
    """The grouped branch of a layer."""

    places: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls, self.drop = site.kind == "linear" and site.called and config.drop_path > 0, config.drop_path
        self.edits = ("weight", "bias") if site.bias else ("weight",)
        out, fan_in, *kernel = site.shape
        self.groups = _blocks(site, config)
        width, rows = fan_in // self.groups, out // int(site.facts.get("groups", 1)) // self.groups
        self.U = nn.Parameter(torch.empty(out, width, *kernel).uniform_(-START, START))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-START, START)) if site.bias else None
        shuffled = torch.arange(fan_in).reshape(self.groups, width).T.flatten()  # which input stands where
        block = torch.arange(out) // rows % self.groups
        self.register_buffer("places", shuffled.reshape(self.groups, width)[block], persistent=False)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch, [batch, ..., in] -> [batch, ..., out]: one dense product is faster than many thin ones."""
        branch = F.linear(x, self._onto(self.U.new_zeros(len(self.U), x.shape[-1])), self.bias)
        if self.drop and self.training:
            branch = branch * F.dropout(branch.new_ones(len(branch), *[1] * (branch.ndim - 1)), self.drop)
        return y + branch

    def read(self, name: str, before: Before) -> Tensor:
        """The weight or bias with the branch in it."""
        value = before[name]
        if name == "bias" and self.bias is not None:
            return value + self.bias.to(value.dtype)
        return self._onto(value)

    def _onto(self, weight: Tensor) -> Tensor:
        """The weight with each block of U added where it belongs."""
        places = self.places.reshape(*self.places.shape, *[1] * (weight.ndim - 2)).expand(self.U.shape)
        return weight.scatter_add(1, places, self.U.to(weight.dtype))

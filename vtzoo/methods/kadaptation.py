"""KAdaptation: add Kronecker products of shared slow and rank-one fast weights (He et al. 2022, arXiv:2203.16329).

    W' = W + scale * sum_i A_i (x) (u_i v_i^T),     i = 1 … n

Shapes: A [n, n, n] for all layers; per layer u [parts, n, out / (parts * n)], v [parts, n, in/groups * kh * kw / n], where
a fused qkv has three parts, one for each of its outputs. A layer whose sizes n does not divide takes the largest common
divisor below n, and shares its A with those alike. A starts Xavier-uniform, v Kaiming-uniform, u at zero.
Folds: exactly.  Identity at init: yes.
Parameters: n^3 once for each n, and out + parts * in/groups * kh * kw per layer.
Departs from the paper: all of an attention's layers by default (the paper's code: query and value, with an A each), and the
layers of the blocks where a backbone has no attention; which layers is a knob, not a search by local intrinsic dimension.
No bias (`+bitfit`) and no dropout of the increment. In that code, whose n = 32 is the default here, A_i is of rank one too,
the scale 160, and u and v both start at zero, where neither gets a gradient.
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
from vtzoo.methods._increment import Increment, matrix

GROUP = "parameter/weight"
PAPER = "arXiv:2203.16329"
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        order: n, how many shared matrices there are, and their height and width.
        scale: of the sum.
        targets: sites by role, name or glob; auto is the layers of the attentions; where there are none, of the blocks.
    """

    order: Annotated[int, Field(ge=1)] = 32
    scale: Annotated[float, Field(gt=0)] = 1.0
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    chosen = {s.name for target in config.targets for s in _meant(anatomy, target)}
    return [s for s in (*anatomy.linears, *anatomy.convs) if s.name in chosen]


def _meant(anatomy: Anatomy, target: str) -> list[Site]:
    """What a target names; of auto the attentions' layers, where there are any."""
    found = anatomy.select([target])
    inside = [s for s in found if anatomy.roles(s) & {"attention", "qkv"}]
    return inside if target == "auto" and inside else found


def order(site: Site, config: Config) -> int:
    """The largest common divisor of a layer's sizes that is not above `order`."""
    out, fan_in = matrix(site)
    common = math.gcd(out // site.facts.get("fused", 1), fan_in)
    return next(n for n in range(min(config.order, common), 0, -1) if common % n == 0)


class Shared(graft.Shared):
    """The slow weights of each order that occurs."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        for n in sorted({order(s, config) for s in sites}):
            bound = (3 / n) ** 0.5
            self.register_parameter(f"A{n}", nn.Parameter(torch.empty(n, n, n).uniform_(-bound, bound)))


class Graft(Increment):
    """The fast weights of one layer; added to its weight, since as a branch they carry n^2 numbers for each token."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        n, parts = order(site, config), int(site.facts.get("fused", 1))
        self.order, self.scale, width = n, config.scale, self.fan_in // n
        self.u = nn.Parameter(torch.zeros(parts, n, self.out // (parts * n)))
        self.v = nn.Parameter(torch.empty(parts, n, width).uniform_(-1, 1) * width**-0.5)

    def increment(self) -> Tensor:
        """What is added, [out, fan_in]."""
        slow: Tensor = getattr(self.shared, f"A{self.order}")
        fast = torch.einsum("pic,pid->ipcd", self.u, self.v)
        blocks = torch.einsum("iab,ix->abx", slow, fast.flatten(1)).unflatten(-1, fast.shape[1:])
        return self.scale * blocks.permute(2, 0, 3, 1, 4).reshape(self.out, self.fan_in)

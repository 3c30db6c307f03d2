"""LoHa: add the elementwise product of two low-rank matrices to frozen weights (Hyeon-Woo et al. 2021, arXiv:2108.06098, prop. 1).

    W' = W + scale * (B1 A1) * (B2 A2),     scale = alpha / rank

Shapes: B1, B2 [out, rank], A1, A2 [rank, in/groups * kh * kw]; the product, whose rank can be rank^2, is reshaped to the
weight. B1, A1 and B2 start Kaiming-uniform, A2 at zero. alpha defaults to rank (scale 1).
Folds: exactly.  Identity at init: yes.
Parameters: 2 * rank * (out + in/groups * kh * kw) per layer.
Departs from the paper: the product is added to a pretrained weight (FedPara trains it as the weight), scaled, as LoHa does
(LyCORIS, arXiv:2309.14859; its code draws normals, PEFT's and this one the paper's He initialization, with
PEFT's bounds). Kernels are flattened: no Tucker form (prop. 3), as is the default there. A called linear runs
the same function as a branch of rank^2 where that is cheaper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._increment import Increment, plus

GROUP = "parameter/weight"
PAPER = "arXiv:2108.06098"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}, "maps": {"lr": 5e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of both factors of the product.
        alpha: scale is alpha / rank; None means rank.
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Graft(Increment):
    """Two low-rank matrices, multiplied entry by entry."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        rank = config.rank
        self.scale = (config.alpha or rank) / rank
        branch, dense = 3 * rank**2 * (self.out + self.fan_in), self.out * self.fan_in  # what training adds per token
        self.calls = site.kind == "linear" and site.called and branch < dense
        self.B1, self.B2 = (nn.Parameter(torch.empty(self.out, rank).uniform_(-1, 1) * rank**-0.5) for _ in range(2))
        self.A1 = nn.Parameter(torch.empty(rank, self.fan_in).uniform_(-1, 1) * self.fan_in**-0.5)
        self.A2 = nn.Parameter(torch.zeros(rank, self.fan_in))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch: the product is that of the columns of B1 and B2, pair by pair, and of the rows of A1 and A2."""
        up = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)
        down = (self.A1[:, None] * self.A2).flatten(0, 1)
        return plus(y, F.linear(x, down), up, self.scale)

    def increment(self) -> Tensor:
        """What is added, [out, fan_in]."""
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

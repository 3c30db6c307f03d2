"""Compacter: adapters whose matrices are sums of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647).

    y = f(x) + gelu(f(x) D + d) U + u,    D = sum_i A_i (x) (s_i t_i^T),  U alike,    i = 1 … order

where f is the attention, and the MLP, each before its residual.
Shapes: A [order, order, order] for all adapters; per adapter of D [channels, rank] s [order, channels / order] and t [order,
rank / order], of U [rank, channels] the other way round; d [rank], u [channels]. A ~ N(0, 1e-4), s and t Xavier-uniform
with gain sqrt(2), as in the authors' code; d and u zero.
Folds: no: an activation stands between its two matrices.  Identity at init: nearly.
Parameters: order^3 once, 3 * (channels + rank) per adapter.
Departs from the paper: the norms stay frozen (stack with `+norm`); the rank is 24 at every width, a 32nd of ViT-B's (the
authors' code: of the channels); a layer scale comes after the adapter; in a block without such parts (ResNet, EfficientNet)
the adapter follows the whole block, position by position; a Mixer's token MLP counts as attention, the adapter acting on
its channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import ATTENTION, MLP, channels, hosts

GROUP = "parameter/weight"
PAPER = "arXiv:2106.04647"
RECIPE = {"tokens": {"lr": 1.2e-2, "weight_decay": 1e-4}, "maps": {"lr": 3e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottlenecks.
        order: how many shared matrices there are, and their height and width; must divide the rank and all channels.
    """

    rank: Annotated[int, Field(ge=1)] = 24
    order: Annotated[int, Field(ge=1)] = 4

    def __post_init__(self) -> None:
        """Refuse an order that does not divide the rank."""
        if self.rank % self.order:
            raise ValueError(f"order={self.order} does not divide rank={self.rank}")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The modules whose outputs pass an adapter.

    Raises:
        UsageError: there are no blocks, or channels that the order does not divide.
    """
    found = hosts(anatomy, ATTENTION, MLP)
    if not found:
        raise UsageError("this backbone has no numbered blocks for an adapter to follow", "use lora or ssf instead")
    for site in found:
        if channels(site) % config.order:
            raise UsageError(
                f"order={config.order} does not divide the {channels(site)} channels of {site.name}", "set order=1 or 2"
            )
    return found


class Shared(graft.Shared):
    """The left factors of all Kronecker products."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:  # noqa: ARG002 - every Shared takes both
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.order, config.order, config.order).normal_(0.0, 1e-4))


class Graft(graft.Graft):
    """A bottleneck on a module's output, made of rank-one right factors."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.axis: int = site.facts["axis"]
        width = channels(site)
        self.s_down, self.t_down, self.s_up, self.t_up = (
            _drawn(config.order, size // config.order) for size in (width, config.rank, config.rank, width)
        )
        self.d, self.u = nn.Parameter(torch.zeros(config.rank)), nn.Parameter(torch.zeros(width))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Add the branch to the output; every position by itself."""
        moved = y.movedim(self.axis, -1)
        hidden = F.gelu(moved @ self._matrix(self.s_down, self.t_down) + self.d, approximate="tanh")
        branch = hidden @ self._matrix(self.s_up, self.t_up) + self.u
        return y + branch.movedim(-1, self.axis)

    def _matrix(self, s: Tensor, t: Tensor) -> Tensor:
        """sum_i A_i (x) (s_i t_i^T)."""
        left = torch.einsum("iab,ip->apib", self.shared.A, s)
        return torch.einsum("apib,iq->apbq", left, t).flatten(0, 1).flatten(1)


def _drawn(order: int, size: int) -> nn.Parameter:
    """Vectors [order, size], each drawn as a matrix of one column."""
    bound = (12 / (size + 1)) ** 0.5
    return nn.Parameter(torch.empty(order, size).uniform_(-bound, bound))

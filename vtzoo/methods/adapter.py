"""Adapter: bottlenecks in sequence with a block's parts (Houlsby et al. 2019, arXiv:1902.00751, sec. 2.1).

    y = f(x) + scale * (U act(D f(x) + d) + u)

placement=houlsby: f is the attention, and the MLP, each before its residual; intermediate: the MLP only, before its
residual (what vision papers often call an adapter); pfeiffer: the whole block, behind its residual (Pfeiffer et al. 2020,
arXiv:2005.00247); adapter+: the same place, with a learned scale (Steitz & Roth 2024, arXiv:2406.06820).
Shapes: D [rank, channels], d [rank], U [channels, rank], u [channels], scale [channels] or 1.
Folds: no: an activation stands between its two matrices.  Identity at init: nearly (D and U ~ truncated N(0, 0.01), as
in the papers); exactly with init=zero (D Kaiming-uniform, U zero).
Parameters: 2 * rank * channels + rank + channels per site, channels more with a learned scale.
Departs from the paper: the norms stay frozen (stack with `+norm`), and pfeiffer has no norm of its own; a layer scale comes
after the adapter; in a block without such parts (ResNet, EfficientNet) the bottleneck follows the whole block, as 1x1
convolutions; a Mixer's token MLP counts as attention, the bottleneck acting on its channels. Dropping whole branches while
training is Adapter+'s. Relied on: the code of Adapter+, whose package its placement is tested against.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import ATTENTION, MLP, Bottleneck, hosts
from vtzoo.methods._sizes import check, sized

GROUP = "adapter/sequential"
PAPER = "arXiv:1902.00751"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}

PARTS = {"houlsby": (ATTENTION, MLP), "intermediate": (MLP,)}  # the others follow the whole block


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        placement: where the bottlenecks stand.
        rank: their width.
        ranks: exceptions, each TARGET:RANK (a role, name or glob); the last that fits a site counts, and 0 leaves it out.
        act: their activation.
        scale: channel learns one factor per channel from 1 on; auto does so for adapter+ alone.
        init: small starts both matrices near zero, zero starts as the identity.
        drop_path: how often an image goes without the branch while training; the others' branch grows in proportion.
    """

    placement: Literal["adapter+", "houlsby", "intermediate", "pfeiffer"] = "adapter+"
    rank: Annotated[int, Field(ge=1)] = 8
    ranks: tuple[str, ...] = ()
    act: Literal["gelu", "relu", "silu"] = "gelu"
    scale: Literal["auto", "channel", "none"] = "auto"
    init: Literal["small", "zero"] = "small"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        """Refuse `ranks` that aren't TARGET:RANK."""
        check("ranks", self.ranks, "rank")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The modules whose outputs pass a bottleneck."""
    found = hosts(anatomy, *PARTS.get(config.placement, ()))
    if not found:
        raise UsageError("this backbone has no numbered blocks for an adapter to follow", "use lora or ssf instead")
    return sized(anatomy, found, "ranks", config.ranks, "rank")


class Graft(Bottleneck):
    """A bottleneck on a module's output."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, site.facts.get("rank", config.rank), config.act)
        self.drop_path = config.drop_path
        learned = config.scale == "channel" or (config.scale == "auto" and config.placement == "adapter+")
        self.scale = nn.Parameter(torch.ones(self.channels)) if learned else None
        if config.init == "zero":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            return
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Add the branch to the output."""
        branch = self.branch(y, self.scale)
        if self.drop_path and self.training:
            kept = branch.new_empty(y.shape[0], *[1] * (y.ndim - 1)).bernoulli_(1 - self.drop_path)
            branch = branch * kept / (1 - self.drop_path)
        return y + branch

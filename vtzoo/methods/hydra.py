"""Hydra: a low-rank head beside a layer and one behind it (Kim et al. 2023, arXiv:2309.06922).

    y = W x + b + scale * (B A x + C D (W x + b))

fold:  W' = W + scale * (B A + C D W),   b' = b + scale * C D b
Shapes: A [rank, in], B [out, rank], C [out, rank], D [rank, out]; on a grouped convolution each per group, with in the
inputs of a group times the kernel's places. A and D start Xavier-uniform, B and C at zero.
Folds: exactly.  Identity at init: yes.
Parameters: rank * (in + 3 * out) per layer.
Departs from the paper: by default the attention's last layer and the MLP's last are adapted, as in the authors' code
for VTAB (github.com/extremebird/Hydra), at rank 8, there 2; the biases that its heads have are left out: stack with
`+bitfit`. A network with neither layer is adapted at all dense convolutions of its blocks, in weight space, as is a
linear that is read and never called; there is no dropout there. A depthwise convolution is refused.
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
from vtzoo.graft import Before
from vtzoo.methods._bottleneck import ATTENTION, MLP
from vtzoo.methods._increment import matrix, plus

GROUP = "parameter/weight"
PAPER = "arXiv:2309.06922"
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
LAST = ("proj", "fc2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of both heads; a layer that can hold less takes what it can hold.
        scale: factor of both heads.
        dropout: inside both heads while training (called linears only).
        targets: layers by role, name or glob; auto is the last layer of each attention and MLP, the blocks' dense
            convolutions where there is neither.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions.

    Raises:
        UsageError: a depthwise convolution is targeted.
    """
    found: dict[str, Site] = {}
    for target in config.targets:
        found |= {s.name: s for s in (_auto(anatomy) if target == "auto" else anatomy.select([target]))}
    if lone := next((n for n, s in found.items() if s.facts.get("groups", 1) == s.shape[0] > 1), None):
        raise UsageError(f"{lone} is depthwise: a head behind it would be a number per channel", "use ssf there")
    return list(found.values())


def _auto(anatomy: Anatomy) -> list[Site]:
    """The layers that end the blocks' attentions and MLPs, or all dense ones."""
    dense = anatomy.select(["auto"])
    return [s for s in dense if s.last in LAST and s.name.split(".")[-2] in (*ATTENTION, *MLP)] or dense


class Graft(graft.Graft):
    """The two heads of a layer."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.edits = ("weight", "bias") if site.bias else ("weight",)
        self.scale, self.dropout, groups = config.scale, config.dropout, int(site.facts.get("groups", 1))
        out, fan_in = site.shape[0] // groups, matrix(site)[1]
        rank, lead = min(config.rank, out, fan_in), (groups,) if groups > 1 else ()
        self.A, self.B = (nn.Parameter(torch.zeros(*lead, *s)) for s in ((rank, fan_in), (out, rank)))
        self.C, self.D = (nn.Parameter(torch.zeros(*lead, *s)) for s in ((out, rank), (rank, out)))
        for down in (self.A, self.D):
            for one in down if lead else [down]:
                nn.init.xavier_uniform_(one)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add both heads, [..., in] and [..., out] -> [..., out]."""
        beside, behind = F.linear(x, self.A), F.linear(y, self.D)
        if self.dropout and self.training:
            beside, behind = F.dropout(beside, self.dropout), F.dropout(behind, self.dropout)
        return plus(plus(y, beside, self.B, self.scale), behind, self.C, self.scale)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight or bias with the heads in it."""
        value = before[name]
        rows = value.reshape(*self.C.shape[:-1], -1)
        change = self.C @ (self.D @ rows.to(self.D.dtype))
        if name == "weight":
            change = change + self.B @ self.A
        return value + self.scale * change.to(value.dtype).reshape(value.shape)

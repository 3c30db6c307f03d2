"""SSF: scale and shift the output of every operation (Lian et al. 2022, arXiv:2210.08823, eq. 4).

    y = gamma * f(x) + beta          fold:  W' = gamma[:, None] * W,  b' = gamma * b + beta

Shapes: gamma [out], beta [out]; after every linear, convolution and norm by default.
Folds: exactly.  Identity at init: yes (with init_std=0.02, the paper's spread of gamma around 1 and beta around 0, no).
Parameters: 2 * out per site, out where the operation has no bias.
Departs from the paper: where an operation has no bias the shift is left out (a fold may not add tensors), so
convolutions before a BatchNorm and the qkv of BEiT and Swin V2 are scaled only; init_std is 0 by default. A
weight-standardised convolution undoes any scale of its weight: its gain is scaled instead, and where it has none (BiT)
it is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before

GROUP = "parameter/weight-and-bias"
PAPER = "arXiv:2210.08823"
RECIPE = {"tokens": {"lr": 5e-3, "weight_decay": 5e-5}, "maps": {"lr": 3e-3, "weight_decay": 5e-5}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        targets: sites by role, name or glob.
        init_std: spread of gamma around 1 and beta around 0 at the start.
    """

    targets: tuple[str, ...] = ("linear", "conv", "norm")
    init_std: Annotated[float, Field(ge=0)] = 0.0


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every operation that the targets name; roles that this backbone lacks are passed over."""
    convs = [s for s in anatomy.convs if s.facts.get("standardised") != "bare"]
    every = [*anatomy.linears, *convs, *anatomy.norms]
    kinds = {s.kind for s in every}
    absent = {"linear", "conv", "norm"} - kinds
    return anatomy.select([t for t in config.targets if t not in absent], every)


class Graft(graft.Graft):
    """gamma and beta of one operation."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        out = site.shape[0]
        self.calls = site.kind == "linear" and site.called
        scaled = "gain" if site.facts.get("standardised") else "weight"
        self.edits = (scaled, "bias") if site.bias else (scaled,)
        self.gamma = nn.Parameter(
            torch.empty(out).normal_(1.0, config.init_std) if config.init_std else torch.ones(out)
        )
        self.beta = nn.Parameter(torch.empty(out).normal_(0.0, config.init_std)) if site.bias else None

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Scale and shift the last axis."""
        return y * self.gamma if self.beta is None else torch.addcmul(self.beta, y, self.gamma)

    def read(self, name: str, before: Before) -> Tensor:
        """Rows of the weight (or gain) times gamma; bias times gamma plus beta."""
        value = before[name]
        if name != "bias":
            return value * self.gamma.reshape(-1, *[1] * (value.ndim - 1))
        return value * self.gamma if self.beta is None else value * self.gamma + self.beta

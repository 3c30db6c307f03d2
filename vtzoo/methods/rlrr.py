"""RLRR: rescale each weight's rows and columns, beside the weight itself (Dong et al. 2024, arXiv:2403.19067).

    W' = W + W * (r c^T),   b' = b + f

Shapes: r [parts, out/parts], c [parts, in], f [out] (stored as `bias`); a fused qkv has 3 parts, a grouped convolution
its groups; a convolution's columns are its inputs per group times the kernel's places. c starts Kaiming-uniform within
sqrt(6 / in), r and f at zero.
Folds: exactly.  Identity at init: yes (with init=kaiming, the paper's, which draws r within sqrt(6), no).
Parameters: 2 * out + parts * in per layer, out less where it has no bias.
Departs from the paper: where a layer has no bias f is left out (a fold may not add tensors); a convolution's weight is
one matrix [out, in * kh * kw], where the authors' code has [out * kh, in * kw]. Their code also scales and shifts the
output of every norm: stack with `+ssf[targets=norm]`. r starts at zero by default: drawn as their code
(github.com/zstarN70/RLRR) draws it, it changes each weight by a tenth on a ViT-S, and it wrecks narrow convolutions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before
from vtzoo.methods._increment import matrix

GROUP = "parameter/weight-and-bias"
PAPER = "arXiv:2403.19067"
RECIPE = {"tokens": {"lr": 6e-3, "weight_decay": 5e-5}, "maps": {"lr": 2e-3, "weight_decay": 5e-5}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        init: zero starts as the backbone; kaiming, as in the paper, off it.
        targets: sites by role, name or glob.
    """

    init: Literal["zero", "kaiming"] = "zero"
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Graft(graft.Graft):
    """Factors of a weight's rows and columns, and a shift of its bias."""

    calls = False  # one product of vectors costs less than a second pass through the layer

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        out, fan_in = matrix(site)
        parts = int(site.facts.get("fused") or site.facts.get("groups", 1))
        self.r = nn.Parameter(torch.zeros(parts, out // parts))
        self.c = nn.Parameter(torch.zeros(parts, fan_in))
        self.bias = nn.Parameter(torch.zeros(out)) if site.bias else None
        self.edits = ("weight", "bias") if site.bias else ("weight",)
        nn.init.uniform_(self.c, -math.sqrt(6 / fan_in), math.sqrt(6 / fan_in))
        if config.init == "kaiming":
            nn.init.uniform_(self.r, -math.sqrt(6), math.sqrt(6))

    def read(self, name: str, before: Before) -> Tensor:
        """The weight, and itself rescaled; the bias shifted."""
        value = before[name]
        if name == "bias" and self.bias is not None:
            return value + self.bias.to(value.dtype)
        rows = value.reshape(*self.r.shape, -1)
        factors = (self.r[:, :, None] * self.c[:, None, :]).to(value.dtype)
        return torch.addcmul(rows, rows, factors).reshape(value.shape)

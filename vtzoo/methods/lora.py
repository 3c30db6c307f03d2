"""LoRA: add a trainable low-rank matrix to frozen weights (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    y = W x + b + (alpha / rank) * B A x            fold:  W' = W + (alpha / rank) * B A

Shapes: linear A [rank, in], B [out, rank]; with a subset of a fused qkv A [parts, rank, in], B [parts, out/3, rank];
conv A [groups * rank, in/groups * kh * kw], B [out, rank], the product reshaped to [out, in/groups, kh, kw] per group.
A starts Kaiming-uniform, B at zero. alpha defaults to rank (scale 1).
Folds: exactly.  Identity at init: yes.
Parameters: rank * (in + out) per linear.
Departs from the paper: every linear of the blocks by default (the paper: q and v), since on small vision sets that is
the stronger choice; a convolution's weight is edited as it is read, so strides, groups, 'same' padding and weight
standardisation fold exactly.
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
from vtzoo.errors import UsageError
from vtzoo.graft import Before

GROUP = "parameter/weight"
PAPER = "arXiv:2106.09685"
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottleneck; a site that can hold less (out or in per group) takes what it can hold.
        alpha: scale is alpha / rank; None means rank.
        dropout: on the branch's input while training (called linears only).
        targets: sites by role, name or glob.
        qkv: which of a fused qkv's three outputs are adapted.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ("auto",)
    qkv: str = "qkv"

    def __post_init__(self) -> None:
        """Refuse a `qkv` that isn't a subset of its three letters, in order."""
        if not self.qkv or "".join(c for c in "qkv" if c in self.qkv) != self.qkv:
            raise ValueError(f"qkv={self.qkv} is not a subset of 'qkv' such as qv")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name.

    Raises:
        UsageError: a part of qkv where no layer's outputs are known to be q, k and v in this order.
    """
    found = anatomy.select(config.targets)
    if config.qkv == "qkv":
        return found
    fused = [s.name for s in found if "fused" in s.facts]
    if strange := next((n for n in fused if not anatomy.value_last(n)), None):
        raise UsageError(
            f"qkv={config.qkv}: the outputs of {strange} are not [q, k, v] in this order (interleaved by head, or of uneven widths)",
            "leave qkv out: lora[rank=8] adapts all of them",
        )
    if not fused:
        raise UsageError(
            f"qkv={config.qkv}: none of the targeted layers is a fused qkv",
            "leave qkv out, or name layers in targets=…",
        )
    return found


class Graft(graft.Graft):
    """A low-rank branch beside a linear, or inside a weight that is read."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.edits = ("weight",)
        self.calls = site.kind == "linear" and site.called
        self.shape, self.groups = site.shape, int(site.facts.get("groups", 1))
        self.scale = (config.alpha or config.rank) / config.rank
        self.dropout = config.dropout
        out, fan_in = site.shape[0] // self.groups, math.prod(site.shape[1:])
        self.slices = (
            [i for i, c in enumerate("qkv") if c in config.qkv] if "fused" in site.facts and config.qkv != "qkv" else []
        )
        rank = min(config.rank, out, fan_in)
        if self.slices:
            self.A, self.B = _parameter(len(self.slices), rank, fan_in), _parameter(len(self.slices), out // 3, rank)
        elif self.groups > 1:
            self.A, self.B = _parameter(self.groups, rank, fan_in), _parameter(self.groups, out, rank)
        else:
            self.A, self.B = _parameter(rank, fan_in), _parameter(out, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch, [..., in] -> [..., out]."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if not self.slices:
            return y + self.scale * F.linear(F.linear(x, self.A), self.B)
        parts = list(y.chunk(3, dim=-1))
        for i, part in enumerate(self.slices):
            parts[part] = parts[part] + self.scale * F.linear(F.linear(x, self.A[i]), self.B[i])
        return torch.cat(parts, dim=-1)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the product added."""
        weight = before[name]
        product = self.scale * (self.B @ self.A).to(weight.dtype)
        if not self.slices:
            return weight + product.reshape(self.shape)
        rows = list(weight.chunk(3))
        for i, part in enumerate(self.slices):
            rows[part] = rows[part] + product[i]
        return torch.cat(rows)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))

"""Bi-LoRA: a low-rank matrix of which a file holds one bit per weight (Jie et al. 2023, arXiv:2307.16867).

    W' = W + scale * q(B) q(A),    q(w) = m + s * (code if w > m else -code),   code = 0.6745

m and s are mean and standard deviation of the matrix, code the upper quartile of N(0, 1), as in the authors' code. The
gradient passes the rounding as if it were not there (straight-through), and m and s besides.
Shapes: A [rank, in], B [out, rank]; conv as LoRA's, per group. In a file A_bits, B_bits [weights / 8] uint8, first
weight in the lowest bit, and A_levels, B_levels [2], m and s. A starts Kaiming-uniform, B truncated N(0, 0.001).
Folds: exactly.  Identity at init: nearly (the paper's start of B).
Parameters: rank * (in + out) bits per layer, in bytes rounded up for each matrix, and 4 levels.
Departs from the paper: every linear of the blocks by default (the paper: q and v). A delta that is attached takes its
levels from the file and keeps them: its latent weights start at the levels, and training on moves bits alone. An
interrupted training resumes with all of its latent weights. The head is not quantised. Code and start from
github.com/JieShibo/PETL-ViT.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before
from vtzoo.methods._increment import matrix, plus

GROUP = "parameter/weight"
PAPER = "arXiv:2307.16867"
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
CODE = 0.6744897501960817


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottleneck; a site that can hold less takes what it can hold.
        scale: factor of the product.
        dropout: between A and B while training (called linears only).
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 32
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Graft(graft.Graft):
    """Two latent matrices that act by their bits."""

    edits = ("weight",)
    A_levels: Tensor | None
    B_levels: Tensor | None

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.scale, self.dropout, groups = config.scale, config.dropout, int(site.facts.get("groups", 1))
        out, fan_in = site.shape[0] // groups, matrix(site)[1]
        rank, lead = min(config.rank, out, fan_in), (groups,) if groups > 1 else ()
        self.A, self.B = (nn.Parameter(torch.zeros(*lead, *s)) for s in ((rank, fan_in), (out, rank)))
        nn.init.uniform_(self.A, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        nn.init.trunc_normal_(self.B, std=1e-3, a=-2e-3, b=2e-3)
        for name in ("A_levels", "B_levels"):
            self.register_buffer(name, None, persistent=False)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch, [..., in] -> [..., out]."""
        hidden = F.linear(x, self._quantised("A"))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return plus(y, hidden, self._quantised("B"), self.scale)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the product added."""
        weight, product = before[name], self._quantised("B") @ self._quantised("A")
        return weight + self.scale * product.to(weight.dtype).reshape(weight.shape)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        """Bits and levels of both matrices."""
        found: dict[str, Tensor] = {}
        for name in ("A", "B"):
            latent, levels = getattr(self, name), self._levels(name)
            bits = F.pad((latent > levels[0]).flatten(), (0, -latent.numel() % 8)).reshape(-1, 8)
            found[f"{name}_bits"] = (bits.to(torch.uint8) << _places(latent)).sum(1, dtype=torch.uint8)
            found[f"{name}_levels"] = levels
        return found

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latent matrices that stand at their levels, and these levels from now on."""
        found = dict(tensors)
        for name in ("A", "B"):
            latent: Tensor = getattr(self, name)
            whole = -(-latent.numel() // 8) == tensors.get(f"{name}_bits", latent[:0]).numel()
            if not whole or tensors.get(f"{name}_levels", latent[:0]).shape != (2,):
                continue  # who loads says what lacks
            bits, levels = found.pop(f"{name}_bits"), found.pop(f"{name}_levels")
            ones = (bits.to(torch.uint8)[:, None] >> _places(bits) & 1).flatten()[: latent.numel()].to(levels)
            setattr(self, f"{name}_levels", levels.to(latent.device, copy=True))
            found[name] = (levels[0] + levels[1] * (CODE * (2 * ones - 1))).reshape(latent.shape)
        return found

    def _levels(self, name: str) -> Tensor:
        """m and s of a matrix: the file's, or its own."""
        kept, latent = getattr(self, f"{name}_levels"), getattr(self, name)
        if kept is not None:
            return kept.to(latent.dtype)
        return torch.stack([latent.mean(), latent.std(correction=min(1, latent.numel() - 1))])

    def _quantised(self, name: str) -> Tensor:
        """A matrix at its two levels, with the latent one's gradient."""
        latent, (m, s) = getattr(self, name), self._levels(name)
        unit = (latent - m) / (s + 1e-5)
        return (CODE * (2 * (latent > m).to(latent.dtype) - 1) + (unit - unit.detach())) * s + m


def _places(like: Tensor) -> Tensor:
    """The bits of a byte, from the lowest."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)

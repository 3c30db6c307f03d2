"""RepAdapter: a linear adapter before a layer, folded into it (Luo et al. 2023, arXiv:2302.08106).

    y = f(x + scale * (B (A x + a) + b)),  f = W . + w      fold:  W' = W + scale * W B A,  w' = w + scale * W (B a + b)

Shapes: A [rank, in], B [in, rank/groups] block-diagonal in `groups` blocks, a [rank], b [in].
A starts Xavier-uniform, the rest at zero.
Folds: exactly.  Identity at init: yes.
Parameters: (1 + 1/groups) * rank * in per layer, rank + in more with biases.
Departs from the paper: on the layer itself, so that a Swin's padded tokens pass the adapter too and its fold is exact
at every size; layers that share an input (a split q, k, v) have an adapter each. The adapter's own biases are left out
where a fold could not hold them: the layer has no bias (a fold may not add tensors), or is a convolution wider than 1x1
(zero padding makes its borders differ), or standardises its weight; and before a key, which softmax frees of any shift.
A convolution, and a linear that is read and never called, is adapted in weight space, without dropout; a grouped
convolution is refused.
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
from vtzoo.lean import thin
from vtzoo.methods._before import layers, shiftable

GROUP = "adapter/sequential"
PAPER = "arXiv:2302.08106"
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottleneck.
        groups: blocks of B; must divide rank and every layer's inputs.
        scale: factor of the branch.
        dropout: between A and B while training (called linears only).
        targets: layers by role, name or glob; auto is linear qkv and fc1 of the blocks, the 1x1 convolutions where there is
            neither, the blocks' dense convolutions where there are none of those.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    groups: Annotated[int, Field(ge=1)] = 2
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        """Refuse groups that cut a block of B unevenly."""
        if self.rank % self.groups:
            raise ValueError(f"groups={self.groups} does not divide rank={self.rank}")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and dense convolutions."""
    found = layers(anatomy, config.targets)
    for site in found:
        if site.shape[1] % config.groups:
            raise UsageError(
                f"groups={config.groups} does not divide the {site.shape[1]} inputs of {site.name}", "set groups=1"
            )
    return found


class Graft(graft.Graft):
    """A low-rank linear adapter on a layer's input."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.groups, self.scale, self.dropout = config.groups, config.scale, config.dropout
        fan_in, rank = site.shape[1], config.rank
        self.A = nn.Parameter(torch.empty(rank, fan_in))
        self.B = nn.Parameter(torch.zeros(fan_in, rank // config.groups))
        biased = shiftable(site)
        self.a = nn.Parameter(torch.zeros(rank)) if biased else None
        self.b = nn.Parameter(torch.zeros(fan_in)) if biased else None
        self.edits = ("weight", "bias") if biased else ("weight",)
        nn.init.xavier_uniform_(self.A)

    def enter(self, x: Tensor) -> Tensor:
        """Pass the input through the adapter, [..., in] -> [..., in]."""
        hidden = thin(x, self.A, self.a)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return x + self.scale * self._up(hidden)

    def read(self, name: str, before: Before) -> Tensor:
        """The layer's weight or bias after the adapter has gone into it."""
        weight = before["weight"]
        if name == "weight":  # W B by groups of inputs, then A
            rows = weight.movedim(1, -1).unflatten(-1, (self.groups, -1))
            blocks = self.B.unflatten(0, (self.groups, -1)).to(weight.dtype)
            low = torch.einsum("...gi,gir->...gr", rows, blocks).flatten(-2)
            return weight + self.scale * (low @ self.A.to(weight.dtype)).movedim(-1, 1)
        assert self.a is not None  # or the bias would not be among the edits
        return before[name] + weight.flatten(1) @ (self.scale * self._up(self.a)).to(weight.dtype)

    def _up(self, hidden: Tensor) -> Tensor:
        """B and b: [..., rank] -> [..., in], one block per group."""
        if self.groups == 1:
            return F.linear(hidden, self.B, self.b)
        blocks = self.B.unflatten(0, (self.groups, -1))
        up = torch.einsum("...gr,gir->...gi", hidden.unflatten(-1, (self.groups, -1)), blocks).flatten(-2)
        return up if self.b is None else up + self.b

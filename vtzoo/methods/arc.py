"""ARC: linear adapters re-composed from one shared projection by each layer (Dong et al. 2023, arXiv:2310.06234).

    y = f(x + U^T (c * U x) + b),  f = W . + w      fold:  W' = W + W U^T diag(c) U,  w' = w + W b

Shapes: U [rank, in] shared by all attention layers of that width, and another by all others; per layer c [rank], b [in].
U starts Xavier-uniform, c and b at zero.
Folds: exactly.  Identity at init: yes (with init=xavier, where each MLP's c starts as in one version of the authors' code, no).
Parameters: rank * in for each width and kind, rank + in per layer, in less without b.
Departs from the paper: on the layer itself, so that a Swin's padded tokens pass the adapter too and its fold is exact
at every size; layers that share an input (a split q, k, v) have a c and b each. Widths take the place of stages (the
authors' Swin has a U for each stage). A width below the rank takes rank = width. b is left out where a fold could not hold it: the layer
has no bias (a fold may not add tensors), or is a convolution wider than 1x1 (zero padding makes its borders differ), or
standardises its weight; and before a key, which softmax frees of any shift. A convolution, and a linear that is read and
never called, is adapted in weight space, without dropout; a grouped convolution is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import QKV, Anatomy, Site
from vtzoo.graft import Before
from vtzoo.methods._before import layers, shiftable

GROUP = "adapter/sequential"
PAPER = "arXiv:2310.06234"
RECIPE = {"tokens": {"lr": 2e-2, "weight_decay": 1e-4}, "maps": {"lr": 5e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: rows of the shared projection.
        dropout: before going up while training (called linears only).
        init: zero starts as the backbone; xavier draws c of the layers that aren't an attention's, as the authors do.
        targets: layers by role, name or glob; auto is linear qkv and fc1 of the blocks, the 1x1 convolutions where there is
            neither, the blocks' dense convolutions where there are none of those.
    """

    rank: Annotated[int, Field(ge=1)] = 50
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init: Literal["zero", "xavier"] = "zero"
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and dense convolutions."""
    return layers(anatomy, config.targets)


def _name(site: Site) -> str:
    """Of the projection that a layer shares."""
    return f"U_{'attention' if site.last in QKV else 'mlp'}{site.shape[1]}"


class Shared(graft.Shared):
    """The projections of each kind of layer and width."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        for name, width in sorted({(_name(s), s.shape[1]) for s in sites}):
            projection = nn.init.xavier_uniform_(torch.empty(min(config.rank, width), width))
            self.register_parameter(name, nn.Parameter(projection))


class Graft(graft.Graft):
    """A layer's own scale of the shared projection, and its shift."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.dropout, self.name = config.dropout, _name(site)
        rank, biased = min(config.rank, site.shape[1]), shiftable(site)
        self.edits = ("weight", "bias") if biased else ("weight",)
        self.c = nn.Parameter(torch.zeros(rank))
        self.b = nn.Parameter(torch.zeros(site.shape[1])) if biased else None
        if config.init == "xavier" and site.last not in QKV:
            nn.init.xavier_uniform_(self.c[None])

    def enter(self, x: Tensor) -> Tensor:
        """Pass the input through the adapter, [..., in] -> [..., in]."""
        hidden = F.linear(x, self._projection) * self.c
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        x = x + hidden @ self._projection
        return x if self.b is None else x + self.b

    def read(self, name: str, before: Before) -> Tensor:
        """The layer's weight or bias after the adapter has gone into it."""
        weight = before["weight"]
        if name == "weight":
            U = self._projection.to(weight.dtype)
            low = F.linear(weight.movedim(1, -1), U) * self.c.to(weight.dtype)
            return weight + (low @ U).movedim(-1, 1)
        assert self.b is not None  # or the bias would not be among the edits
        return before[name] + weight.flatten(1) @ self.b.to(weight.dtype)

    @property
    def _projection(self) -> Tensor:
        return getattr(self.shared, self.name)

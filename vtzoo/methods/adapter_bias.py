"""AdapterBias: shift a layer's output along one vector, by an amount for each token (Fu et al. 2022, arXiv:2205.00305).

    y = W x + b + (w . x + c) v          fold:  W' = W + v w^T,  b' = b + c v

at the last layer of each MLP, x its input (so that the amount is a linear function of the MLP's hidden units).
Shapes: v [out], w [in/groups, kh, kw] as the layer's weight has them, c [1]. v and c start at zero, w ~ N(0, 0.02).
Folds: exactly.  Identity at init: yes.
Parameters: out + in/groups * kh * kw + 1 per layer, 1 less without a bias.
Departs from the paper: the norms stay frozen (stack with `+norm`). That w reads the MLP's hidden units, not its output, is from the
authors' code. c is left out where the layer has no bias (a fold may not add tensors). In a network without MLPs the
layer is the last convolution on each block's main path that gives the block's output its shape, the amount one for each
position and group, and the edit comes before any weight standardisation. A Mixer's token MLPs are passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Before

GROUP = "parameter/bias"
PAPER = "arXiv:2205.00305"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}, "maps": {"lr": 5e-3, "weight_decay": 1e-4}}
SIDE = ("downsample", "shortcut")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        targets: layers by role, name or glob; auto is the last of each MLP, or of each block where there are no MLPs.
    """

    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions.

    Raises:
        UsageError: there is neither an MLP nor a numbered block.
    """
    named = anatomy.select([t for t in config.targets if t != "auto"])
    auto = _auto(anatomy) if "auto" in config.targets else []
    chosen = {s.name for s in (*named, *auto)}
    return [s for s in (*anatomy.linears, *anatomy.convs) if s.name in chosen]


def _auto(anatomy: Anatomy) -> list[Site]:
    """The last layer of each MLP; without those, of each block."""
    every = [s for s in (*anatomy.linears, *anatomy.convs) if "blocks" in anatomy.roles(s)]
    mlps = [s for s in every if s.last == "fc2" and "mlp" in _parent(s) and "tokens" not in _parent(s)]
    found = mlps or [s for b in anatomy.blocks if (s := _last(anatomy, b)) is not None]
    if not found:
        raise UsageError("this backbone has no MLPs and no numbered blocks", "name layers in targets=…")
    return found


def _last(anatomy: Anatomy, block: Site) -> Site | None:
    """The last layer called in a block whose output is shaped like the block's."""
    near = [s for s in anatomy.select(["auto"]) if s.name.startswith(f"{block.name}.")]
    inside = {s.name: s for s in near if not any(word in s.name for word in SIDE)}
    ends = [inside[n] for n, seen in anatomy.seen.items() if n in inside and seen.y[1:] == block.shape]
    return ends[-1] if ends else None


def _parent(site: Site) -> str:
    return site.name.rpartition(".")[0].rpartition(".")[2]


class Graft(graft.Graft):
    """The vector of one layer, and what its amount is made of."""

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - every graft takes both
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.edits = ("weight", "bias") if site.bias else ("weight",)
        self.v = nn.Parameter(torch.zeros(site.shape[0]))
        self.w = nn.Parameter(torch.empty(site.shape[1:]).normal_(0.0, 0.02))
        self.c = nn.Parameter(torch.zeros(1)) if site.bias else None

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Shift the output, [..., in] -> [..., out]."""
        amount = (x @ self.w)[..., None]
        return torch.addcmul(y, amount if self.c is None else amount + self.c, self.v)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the outer product, the bias with c times the vector."""
        value = before[name]
        if name == "bias":
            assert self.c is not None  # or the bias would not be among the edits
            return value + (self.c * self.v).to(value.dtype)
        return value + torch.tensordot(self.v, self.w, 0).to(value.dtype)

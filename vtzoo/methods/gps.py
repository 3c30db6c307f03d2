"""GPS: train the input weights of each neuron on which the loss depends most (Zhang et al. 2023, arXiv:2312.10136, sec. 3.1).

    W'[o, i] = W[o, i] + w[o, j]   where i = at[o, j] is one of the k inputs of neuron o with the largest score
    b' = b + c

Scores are squared gradients of a supervised contrast on the caller's images: see `vtzoo.sensitivity`.
Shapes: w [out, k], at [out, k] (whole numbers, kept and not trained), c [out]; a convolution's inputs are
in/groups * kh * kw.  All start at zero.
Folds: exactly.  Identity at init: yes.
Parameters: (k + 1) * out per layer, k * out where it has no bias, and as many places as weights beside them.
Departs from the paper: gradients are squared, then summed over batches (the paper sums first; the order within one batch
is the same), of images as they are, not of two augmented views. That biases train whole, and norms, class token and
position embedding don't, follows the authors' code (github.com/FightingFighting/GPS). A depthwise 1x1 convolution that
standardises its weight is passed over: nothing of a lone weight is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before, Scores
from vtzoo.methods._sparse import added, largest

GROUP = "parameter/weight-and-bias"
PAPER = "arXiv:2312.10136"
RECIPE = {"tokens": {"lr": 3e-3, "weight_decay": 0.0}, "maps": {"lr": 2e-3, "weight_decay": 0.0}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        k: trained weights per neuron; a neuron with fewer inputs trains them all.
        bias: train the biases too.
        targets: layers by role, name or glob.
    """

    k: Annotated[int, Field(ge=1)] = 1
    bias: bool = True
    targets: tuple[str, ...] = ("linear", "conv")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every layer that the targets name; roles that this backbone lacks are passed over."""
    layers = [*anatomy.linears, *anatomy.convs]
    absent = {"linear", "conv"} - {s.kind for s in layers}
    found = anatomy.select([t for t in config.targets if t not in absent], layers)
    return [s for s in found if not (math.prod(s.shape[1:]) == 1 and "standardised" in s.facts)]


class Graft(graft.Graft):
    """A few weights of every neuron of a layer, and its bias."""

    calls = False
    at: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        out, count = site.shape[0], min(config.k, math.prod(site.shape[1:]))
        self.weight = nn.Parameter(torch.zeros(out, count))
        self.register_buffer("at", torch.zeros(out, count, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out)) if site.bias and config.bias else None
        self.edits = ("weight",) if self.bias is None else ("weight", "bias")

    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """Choose the inputs."""
        self.at.copy_(largest(scores("weight").flatten(1), self.at.shape[1]))

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with its chosen entries changed, or the bias."""
        if name == "bias" and self.bias is not None:
            return before[name] + self.bias.to(before[name].dtype)
        return added(before[name], self.at, self.weight)

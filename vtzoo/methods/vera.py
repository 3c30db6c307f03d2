"""VeRA: add a random low-rank matrix that all layers share, scaled by two vectors (Kopiczko et al. 2023, arXiv:2310.11454, eq. 2).

    W' = W + diag(b) B diag(d) A

Shapes: trained d [rank] and b [out] per layer; frozen A [rank, widest in] and B [widest out, rank] for all, of which a
layer takes the first columns (in/groups * kh * kw) and rows (out), uniform in +- sqrt(6 / fan_in), drawn from `seed`
whenever the delta is put on or folded, so that no file stores them. d starts at `start`, b at zero.
Folds: exactly.  Identity at init: yes.
Parameters: rank + out per layer.
Departs from the paper: every linear of the blocks by default (the paper: query and value); layers of different shapes share one
pair by slicing, as in PEFT's code, whose bounds these are too (but not its random numbers); convolutions count as matrices. A
called linear runs the same function as a branch where that is cheaper.
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
from vtzoo.methods import _frozen
from vtzoo.methods._increment import Increment, matrix

GROUP = "parameter/weight"
PAPER = "arXiv:2310.11454"
RECIPE = {"tokens": {"lr": 2e-2, "weight_decay": 1e-4}, "maps": {"lr": 5e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of the shared matrices.
        start: first value of d.
        seed: of the shared matrices.
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 256
    start: Annotated[float, Field(gt=0)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


class Shared(graft.Shared):
    """The random matrices of all layers, wide enough for each."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        rank = config.rank
        out, fan_in = (max(sizes) for sizes in zip(*map(matrix, sites), strict=True))
        for name, shape, seed in (("A", (rank, fan_in), 2 * config.seed), ("B", (out, rank), 2 * config.seed + 1)):
            value = _frozen.uniform(*shape, seed=seed, bound=(6 / shape[1]) ** 0.5)
            self.register_buffer(name, value, persistent=False)


class Graft(Increment):
    """The two vectors of one layer."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        branch, dense = (
            2 * config.rank * (self.out + self.fan_in),
            self.out * self.fan_in,
        )  # what training adds per token
        self.calls = site.kind == "linear" and site.called and branch < dense
        self.d = nn.Parameter(torch.full((config.rank,), config.start))
        self.b = nn.Parameter(torch.zeros(self.out))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch, [..., in] -> [..., out]."""
        down, up = self._matrices()
        return torch.addcmul(y, self.b, F.linear(self.d * F.linear(x, down), up))

    def increment(self) -> Tensor:
        """What is added, [out, fan_in]."""
        left, right = self.factors("weight")
        return left @ right

    def factors(self, name: str) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the one that it edits
        """b B and d A, [out, rank] and [rank, fan_in]."""
        down, up = self._matrices()
        return self.b[:, None] * up, self.d[:, None] * down

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """The layer's part of A and B."""
        return self.shared.A[:, : self.fan_in], self.shared.B[: self.out]

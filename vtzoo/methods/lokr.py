"""LoKr: add a Kronecker product, its larger factor of low rank, to frozen weights (Yeh et al. 2023, arXiv:2309.14859).

    W' = W + scale * w1 (x) w2,     w2 = w2a w2b,     scale = alpha / rank

Shapes: out = a * c and in/groups = b * d; w1 [a, b], w2a [c, rank], w2b [rank, d * kh * kw]. Where rank is half of c or d
or more, one w2 [c, d * kh * kw]; with decompose_both, where rank is less than half of a or b, w1a [a, rank] and w1b [rank, b].
All start Kaiming-uniform but w1 (or w1a), at zero. alpha defaults to rank (scale 1).
Folds: exactly.  Identity at init: yes.
Parameters: a * b + rank * (c + d * kh * kw) per layer, or those of the shapes above.
Departs from the paper: w1 is zero at the start, as in PEFT's code (LyCORIS' own: w2b), and the scale stays when nothing is of
low rank, as it does there; kernels are flattened, without a Tucker form. A called linear runs the same function as a branch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._increment import Increment

GROUP = "parameter/weight"
PAPER = "arXiv:2309.14859"
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of the larger factor.
        alpha: scale is alpha / rank; None means rank.
        factor: a and b, where it divides; elsewhere, and when None, they are the largest divisors below the root (and below it).
        decompose_both: make the smaller factor of low rank too.
        targets: sites by role, name or glob.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    factor: Annotated[int, Field(ge=1)] | None = None
    decompose_both: bool = False
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


def split(size: int, factor: int | None = None) -> tuple[int, int]:
    """A size as a product of two."""
    if factor and size % factor == 0:
        return factor, size // factor
    first = next(n for n in range(min(math.isqrt(size), factor or size), 0, -1) if size % n == 0)
    return first, size // first


class Graft(Increment):
    """The two factors of a Kronecker product."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.calls = site.kind == "linear" and site.called
        rank, (out, inner, *kernel) = config.rank, site.shape
        self.scale = (config.alpha or rank) / rank
        (a, c), (b, d) = split(out, config.factor), split(inner, config.factor)
        self._hold("w1", a, b, rank if config.decompose_both and 2 * rank < max(a, b) else None)
        self._hold("w2", c, d * math.prod(kernel), rank if 2 * rank < max(c, d) else None)
        self.blocks = b
        nn.init.zeros_(next(self.parameters()))

    def _hold(self, name: str, rows: int, columns: int, rank: int | None) -> None:
        """Register a matrix, or its two factors."""
        shapes = {"": (rows, columns)} if rank is None else {"a": (rows, rank), "b": (rank, columns)}
        for end, shape in shapes.items():
            self.register_parameter(name + end, nn.Parameter(torch.empty(shape).uniform_(-1, 1) * shape[1] ** -0.5))

    def _factors(self, name: str) -> list[Tensor]:
        """A matrix, or its two factors, from left to right."""
        return [p for n, p in self.named_parameters() if n.startswith(name)]

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch: w2b and w2a act within each of b blocks of the input, w1 between them."""
        w1, (*up, down) = self._left(), self._factors("w2")
        inner = F.linear(x.unflatten(-1, (self.blocks, -1)), down)
        mixed = F.linear(inner.mT, w1).mT
        return y + self.scale * (F.linear(mixed, up[0]) if up else mixed).flatten(-2)

    def _left(self) -> Tensor:
        """The smaller factor, [a, b]."""
        first, *rest = self._factors("w1")
        return first @ rest[0] if rest else first

    def increment(self) -> Tensor:
        """What is added, [out, fan_in]."""
        first, *rest = self._factors("w2")
        return self.scale * torch.kron(self._left(), first @ rest[0] if rest else first)

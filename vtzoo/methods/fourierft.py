"""FourierFT: learn few Fourier coefficients of a weight's change (Gao et al. 2024, arXiv:2405.03003, eq. 2-4).

    y = (W + D) x + b        fold:  W' = W + D,   D = alpha * Re IDFT2(F),   F[places] = c,  F = 0 elsewhere

Shapes: c [n], at n different places of [out, in/groups * kh * kw] drawn by the seed, the same in layers of one shape;
a smaller matrix has a coefficient for every place. The inverse transform divides by out * in. alpha is 300 at the
paper's 768 x 768 and, unless given, in proportion to the entries of other matrices, so that a coefficient moves them
all alike.
Folds: exactly.  Identity at init: yes (with init_std=1, the paper's, no).
Parameters: n per layer.
Departs from the paper: every linear of the blocks by default (the paper: q and v, one alpha for all), convolutions
too; a fused qkv is one matrix. c starts at zero, as PEFT's does on request: the paper's N(0, 1) gives the change of a
768 x 768 weight a spread of 0.02 before any training (the authors' code learns it at 0.2 on ViT-B; here it learns
`plus` times as fast as the head). The places are not PEFT's, nor favour some frequencies (eq. 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._frozen import chosen
from vtzoo.methods._increment import Increment

GROUP = "parameter/weight"
PAPER = "arXiv:2405.03003"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        n: coefficients per layer, at most.
        alpha: factor of the change; None means 300 per 768 x 768 entries.
        seed: of the places.
        init_std: spread of the coefficients at the start.
        plus: factor of the coefficients' learning rate.
        targets: sites by role, name or glob.
    """

    n: Annotated[int, Field(ge=1)] = 3000
    alpha: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 777
    init_std: Annotated[float, Field(ge=0)] = 0.0
    plus: Annotated[float, Field(gt=0)] = 10.0
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


@lru_cache(64)
def _places(count: int, total: int, seed: int) -> Tensor:
    """Drawn once for all layers of a shape."""
    return chosen(count, total, seed=seed)


class Graft(Increment):
    """The coefficients of one layer."""

    places: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        total = self.out * self.fan_in
        count = min(config.n, total)
        self.alpha, self.rates = config.alpha or 300 * total / 768**2, {"c": config.plus}
        self.c = nn.Parameter(config.init_std * torch.randn(count))
        self.register_buffer("places", _places(count, total, config.seed), persistent=False)

    def increment(self) -> Tensor:
        """alpha * Re IDFT2(F)."""
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))  # no transform in half precision
        F = c.new_zeros(self.out * self.fan_in).index_add(0, self.places, c)
        return self.alpha * torch.fft.ifft2(F.reshape(self.out, self.fan_in)).real

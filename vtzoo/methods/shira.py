"""SHiRA: train a fixed sparse choice of a weight's entries (Bhardwaj et al. 2024, arXiv:2406.13175, sec. 3.1).

    y = (W + S) x + b        fold:  W' = W + S,   S[places] = s,  S = 0 elsewhere

    mask=random       drawn by the seed, the same in layers of one shape                   SHiRA-Rand
    mask=magnitude    the largest |W|                                                      SHiRA-WM
    mask=gradient     the largest |g|, g the loss's gradient                               SHiRA-Grad
    mask=snip         the largest |W g|                                                    SHiRA-SNIP

Shapes: s [k], k = fraction * entries, rounded, 16 or all at least; places [k] in the flattened weight, 32-bit whole
numbers, stored with the delta and never trained (a random mask is drawn anew instead). s starts at zero.
Folds: exactly.  Identity at init: yes.
Parameters: fraction of a layer's weight.
Departs from the paper: |g| is the root of the squared gradients summed over batches, of a contrastive loss (see
vtzoo.sensitivity). SHiRA-Struct (rows, columns and the diagonal) is left out. Convolutions too; small layers, such as
those of squeeze-and-excite, have 16 trained entries where the fraction would leave one or none. PEFT has random masks
only, of rank * (in + out) entries; the places here are not PEFT's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before, Scores, stored
from vtzoo.methods._frozen import chosen
from vtzoo.methods._sparse import added, largest

GROUP = "parameter/weight"
PAPER = "arXiv:2406.13175"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 0.0}, "maps": {"lr": 1e-3, "weight_decay": 0.0}}
FEWEST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        fraction: of a layer's weight that is trained.
        mask: how its entries are chosen; gradient and snip need images.
        seed: of a random mask.
        targets: sites by role, name or glob.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    mask: Literal["random", "magnitude", "gradient", "snip"] = "random"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name."""
    return anatomy.select(config.targets)


@lru_cache(64)
def _places(count: int, total: int, seed: int) -> Tensor:
    """Drawn once for all layers of a shape."""
    return chosen(count, total, seed=seed).int()


class Graft(graft.Graft):
    """The trained entries of one layer's weight."""

    calls = False
    edits = ("weight",)
    places: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        total = math.prod(site.shape)
        count = max(min(FEWEST, total), round(config.fraction * total))
        self.mask = config.mask
        self.s = nn.Parameter(torch.zeros(count))
        drawn = config.mask == "random"
        places = _places(count, total, config.seed) if drawn else torch.arange(count, dtype=torch.int32)
        self.register_buffer("places", places, persistent=not drawn)

    @torch.no_grad()
    def start(self, host: nn.Module, scores: Scores) -> None:
        """The places that rate highest."""
        if self.mask == "random":
            return
        rated = torch.ones(()) if self.mask == "magnitude" else scores("weight").cpu().double().sqrt()
        if self.mask != "gradient":
            rated = rated * stored(host, "weight").cpu().double().abs()
        self.places.copy_(largest(rated.flatten(), len(self.s)))

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the entries added."""
        return added(before[name], self.places, self.s)

"""PLOT: several learned prompts for a class, matched with the places of an image (Chen et al. 2023, arXiv:2210.01253, eq. 9).

    S = F T_c' [places, prompts],  F and T_c normalised;   P = optimal transport between both, each place and each prompt of equal mass,
    at the cost 1 - S: Sinkhorn on exp((S - 1) / entropy), without a gradient;      logit_c = exp(s) sum P * S + b

Shapes: v [prompts * context, width of the text tower].  Folds: no: what a class is compared with are places of the image, by a plan of
that image's own.  Identity at init: no (v starts at random, so that prompts differ).
Parameters: prompts * context * width.
Departs from the paper: iterations end for each image and class by themselves, not by the mean over a batch, so that an answer does not
depend on its neighbours; a place is what the trunk pools of it alone, for a transformer the patch token behind the last norm, where
the official code has a CLIP ResNet's attention pooling with every place as a query: trunks that pool by attention are refused; vectors of
each class's own are left out (with several prompts they do not run in the official code).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._language import RANDOM, spoken
from vtzoo.methods._language import Vectors as Graft
from vtzoo.speech import Position, slotted
from vtzoo.text_head import TextHead
from vtzoo.text_tower import EMBEDDING

GROUP = "prompt/language-driven"
PAPER = "arXiv:2210.01253"
FAMILIES = ("tokens", "maps")
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "weight_decay": 5e-4}}
TELLS_ALL = True
__all__ = [
    "FAMILIES",
    "GROUP",
    "PAPER",
    "RECIPE",
    "TELLS_ALL",
    "Config",
    "Graft",
    "Told",
    "Transport",
    "head",
    "matched",
    "plan",
    "sites",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        prompts: of a class.
        context: vectors of a prompt.
        position: of the class's name: behind them, in their middle, or before them.
        entropy: of the transport, in units of the cost; the smaller, the fewer places go to several prompts.
        iterations: of Sinkhorn's algorithm at most.
        tolerance: mean change of a scaling at which it ends.
    """

    prompts: Annotated[int, Field(ge=1)] = 4
    context: Annotated[int, Field(ge=1)] = RANDOM
    position: Position = "end"
    entropy: Annotated[float, Field(ge=0.03)] = 0.1
    iterations: Annotated[int, Field(ge=1)] = 100
    tolerance: Annotated[float, Field(ge=0)] = 1e-2


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding of the text tower.

    Raises:
        UsageError: no text tower, no names, or a trunk that pools by attention.
    """
    head, model = spoken(anatomy, "plot"), anatomy.model
    if not getattr(model, "places", False):
        raise UsageError(
            "plot looks at the places of an image, and this trunk pools them by attention", "use coop, or another trunk"
        )
    facts = {
        "width": head.model.text.token_embedding.embedding_dim,
        "init": [],
        "count": config.prompts * config.context,
    }
    return (Site(name=EMBEDDING, kind="params", facts={**facts, "classes": 0}),)


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """A classifier that looks at the places of an image; without a text tower, one that holds what it is to know."""
    return Told(old, config) if isinstance(old, TextHead) else Transport(old.in_features, old.out_features, config)


class Transport(nn.Module):
    """Embeddings of places [n, places, embed_dim], normalised -> logits [n, classes].

    It holds exp(s) T [classes, prompts, embed_dim] and b [classes].
    """

    placed = True
    """It wants places, see `vtzoo.dual.Dual.forward_head`."""
    prompts: Tensor
    bias: Tensor

    def __init__(self, features: int, classes: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("prompts", torch.zeros(classes, config.prompts, features))
        self.register_buffer("bias", torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        """Compare with every class."""
        return matched(x, self.prompts, self.bias, self.config)


class Told(TextHead):
    """The same, made by a text tower."""

    held = ("prompts", "bias")
    placed = True

    def __init__(self, old: TextHead, config: Config) -> None:
        model: Any = old.model
        one = slotted(model.tokenize, old.words, config.context, config.position, model.text.context_length)
        self.config = config
        ids = [torch.where(one < 0, one - i * config.context, one) for i in range(config.prompts)]
        super().__init__(model, old.words, old.templates, torch.cat(ids, 1))

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of exp(s) T and b."""
        return (self.out_features, self.config.prompts, self.in_features), (self.out_features,)

    def computed(self) -> tuple[Tensor, Tensor]:
        """exp(s) T and b, made now."""
        return self.scaled(F.normalize(self.texts(), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Compare with every class."""
        return matched(x, *self.layer(), self.config)


def matched(x: Tensor, prompts: Tensor, bias: Tensor, config: Config) -> Tensor:
    """Logits [n, classes] of places [n, places, embed_dim], given exp(s) T [classes, prompts, embed_dim] and b [classes]."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        scaled = torch.einsum("bmd,cnd->bcmn", x.to(prompts.dtype), prompts)
        alike = scaled.detach() / prompts.detach().norm(dim=-1)[:, None]
        return (plan(alike, config) * scaled).sum((-2, -1)) + bias


def plan(alike: Tensor, config: Config) -> Tensor:
    """Optimal transport between the rows and the columns of similarities, [..., m, n] -> the same, its numbers' sum 1 (Sinkhorn)."""
    kernel = ((alike.flatten(0, -3) - 1) / config.entropy).exp()
    turned, row, column = kernel.mT, 1 / kernel.shape[-2], 1 / kernel.shape[-1]
    rows, columns = torch.ones_like(kernel[..., :1]), torch.ones_like(turned[..., :1])
    done = torch.zeros_like(kernel[..., :1, :1], dtype=torch.bool)
    for _ in range(config.iterations):
        new = row / torch.bmm(kernel, columns)
        still = done | ((new - rows).abs().mean(-2, keepdim=True) < config.tolerance)
        rows, columns = torch.where(done, rows, new), torch.where(done, columns, column / torch.bmm(turned, new))
        done = still
        if not torch.compiler.is_compiling() and bool(done.all()):
            break
    return (rows * kernel * columns.mT).view_as(alike)

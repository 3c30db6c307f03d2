"""CoCoOp: learned context that each image moves (Zhou et al. 2022, arXiv:2203.05557, eq. 3).

    v_m(x) = v_m + W_2 ReLU(W_1 f + b_1) + b_2,   f = the image's normalised embedding;   T_c(x) as in CoOp, of v(x)
    logits = exp(s) f T(x)' + b

Shapes: v [count, width of the text tower]; in the head W_1 [h, embed_dim], W_2 [width, h], h below.
Folds: no: each image has a classifier of its own, which the text tower makes.  Identity at init: no (W_2 and the biases start at random).
Parameters: count * width; in the head (embed_dim + 1) * h + (h + 1) * width with h = embed_dim / reduction, 8 at least.
Departs from the paper: nothing in the formula; a few images' prompts go through the text tower at a time, and where there are more of
them their activations are computed again in the backward pass, so that memory doesn't grow with images times classes.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vtzoo.anatomy import Anatomy, Site
from vtzoo.attention import PlainAttention
from vtzoo.graft import grafts
from vtzoo.methods._language import Vectors, Words, place, slots
from vtzoo.text_head import ROWS, Spoken, TextHead

GROUP = "prompt/language-driven"
PAPER = "arXiv:2203.05557"
FAMILIES = ("tokens", "maps")
RECIPE = {
    "tokens": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4},
    "maps": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4},
}

LEAST = 8
"""Hidden units of what moves the context: with fewer, none might be awake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Words):
    """Knobs; see `Words` for the others.

    Attributes:
        reduction: the embedding's width over the hidden one of what moves the context.
    """

    reduction: Annotated[int, Field(ge=1)] = 16


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding of the text tower."""
    return (place(anatomy, config, "cocoop"),)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """A classifier that runs the text tower for each image."""
    return Conditional(old, slots(old, config), config.reduction) if isinstance(old, TextHead) else None


class Graft(Vectors):
    """The learned vectors, and how far each image moves them while its prompts are read."""

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - the site says it all
        super().__init__(site)
        self.shift: Tensor | None = None

    @contextmanager
    def moved(self, shift: Tensor) -> Generator[None]:
        """Within it there are vectors of each image, one image's after another's; [images, width] is added to them."""
        self.shift = shift
        try:
            yield
        finally:
            self.shift = None

    def vectors(self) -> Tensor:
        """[count, width], or [images * count, width]."""
        return self.context if self.shift is None else (self.context + self.shift[:, None]).flatten(0, 1)


class Conditional(Spoken):
    """Image embeddings [n, embed_dim], normalised -> logits [n, classes], each row by prompts of its own.

    Args:
        old: the classifier whose classes it has.
        ids: prompts with places for vectors, [classes, 1, context].
        reduction: see `Config`.
    """

    def __init__(self, old: TextHead, ids: Tensor, reduction: int) -> None:
        super().__init__(old.model, old.words, old.templates, ids)
        width = self.model.text.token_embedding.embedding_dim
        hidden = max(LEAST, self.in_features // reduction)
        self.fc1, self.fc2 = nn.Linear(self.in_features, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compare each image with every class as it reads them."""
        shift, few = self.fc2(F.relu(self.fc1(x))), max(1, ROWS // self.out_features)
        if torch.compiler.is_compiling() or len(x) <= few:
            return self.compared(x, shift)
        run: Any = self.compared
        if torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, context_fn=lambda: (PlainAttention(), PlainAttention()))
        return torch.cat([run(*part) for part in zip(x.split(few), shift.split(few), strict=True)])

    def compared(self, x: Tensor, shift: Tensor) -> Tensor:
        """Some images' logits, given how far each moves the context, [images, width]."""
        (own,) = (g for g in grafts(self.model.text.token_embedding) if isinstance(g, Graft))
        first = torch.arange(x.shape[0], device=x.device)[:, None, None, None] * len(own.context)
        ids = torch.where(self.ids < 0, self.ids - first, self.ids).flatten(0, 1)
        with own.moved(shift):
            weight, bias = self.scaled(F.normalize(self.texts(ids)[:, 0], dim=-1))
        own_weight, own_bias = (t.unflatten(0, (-1, self.out_features)) for t in (weight, bias))
        return (own_weight @ x.to(weight.dtype)[..., None])[..., 0] + own_bias

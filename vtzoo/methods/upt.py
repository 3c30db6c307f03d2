"""UPT: one row of prompts, of which a small transformer makes those of both towers (Zang et al. 2022, arXiv:2210.07225, eq. 8-10).

    U' = norm_1(U + attention(U)),   [T, V] = U' + W_2 relu(W_1 norm_2(U') + b_1) + b_2

    s = text([T_1 ... T_n, name]),   [c, _, E'] = norm(blocks(norm_pre([c, V A' + a, E])))

Shapes: U [2 tokens, w] with w the width of the text tower; attention's qkv [3 w, w], proj [w, w] and their biases; norms [w] and [w], twice;
W [w, w] and b [w], twice; A [width of the trunk, w], a [width of the trunk].
Folds: no: T is in the classifier, but V stands beside the patches in all of the image tower's blocks, which no stock architecture does.
Identity at init: no.
Parameters: 2 tokens w + 6 w^2 + 10 w + (w + 1) * trunk width.
Departs from the paper: the order of norms and sums is that of the code that is to be had (a fork of the authors'), where each prompt attends
to itself alone, since the row is taken for a batch; here all attend to all, as in the paper. Dropout is on what attention and MLP
give, not on attention's weights. Prompts take no part in pooling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods import _vision_language as both
from vtzoo.methods._language import STD
from vtzoo.text_tower import Attention

GROUP = "prompt/vision-language"
PAPER = "arXiv:2210.07225"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 5e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: prompts in each tower.
        dropout: inside the small transformer while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding, and the image tower's blocks from end to end."""
    return both.places(anatomy, _prompts(config), "upt")


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the prompts among its words."""
    return both.prompted(old, _prompts(config))


def _prompts(config: Config) -> both.Prompts:
    return both.Prompts(init="", tokens=config.tokens)


class Shared(both.Coupled):
    """The row, and what makes prompts of it."""

    def create(self, text: int, image: int) -> None:
        """U and the layers of the transformer."""
        self.row = nn.Parameter(torch.empty(2 * self.config.tokens, text).normal_(std=STD))
        self.attention = Attention(text, heads=1)
        nn.init.xavier_uniform_(self.attention.qkv.weight)
        for linear in (self.attention.qkv, self.attention.proj):
            nn.init.zeros_(linear.bias)
        self.norm1, self.norm2 = nn.LayerNorm(text), nn.LayerNorm(text)
        self.fc1, self.fc2 = nn.Linear(text, text), nn.Linear(text, text)
        self.out = nn.Linear(text, image)

    def text(self, level: int) -> Tensor:  # noqa: ARG002 - there is one
        """T."""
        return self._made()[: self.config.tokens]

    def visual(self, level: int) -> Tensor:  # noqa: ARG002 - there is one
        """V A' + a."""
        return self.out(self._made()[self.config.tokens :])

    def _made(self) -> Tensor:
        row = self.row[None]
        row = self.norm1(row + self._drop(self.attention(row, row, row)[0]))
        hidden = self._drop(F.relu(self.fc1(self.norm2(row))))
        return (row + self._drop(self.fc2(hidden)))[0]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


class Graft(both.Graft):
    """The prompts of one place."""

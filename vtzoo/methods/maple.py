"""MaPLe: prompts in both towers, those of the image tower made from those of the text tower (Khattak et al. 2023, arXiv:2210.03117, eq. 4-10).

    [s, _, W] = text_block_i([s, P_i, W]),   [c, _, E] = block_i([c, F_i(P_i), E])   for i < depth;   F_i(P) = P A_i' + b_i

Behind these blocks what became of the last prompts goes on. P_0 stands among the words' embeddings, F_0(P_0) comes in before the norm
in front of the blocks.
Shapes: prompts P [depth, tokens, width of the text tower], A [depth, width of the trunk, width of the text tower], b [depth, width of the trunk].
Folds: no: the text tower's side is in the classifier, but fresh prompts enter the image tower's blocks, which no stock architecture does.
Identity at init: no.
Parameters: depth * tokens * text width + depth * (text width + 1) * trunk width.
Departs from the paper: prompts take no part in pooling, and stand behind the class token, not behind the patches, which is the same
to attention; where the towers have fewer blocks than `depth`, all have prompts. As in the paper's code, the rest of the words that the
first prompts start from stays in front of the name ("a photo" is learned, "of a" is not), and all A_i but the first start equal.
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

GROUP = "prompt/vision-language"
PAPER = "arXiv:2210.03117"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 3.5e-3, "weight_decay": 5e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(both.Prompts):
    """Knobs; see `Prompts`.

    Attributes:
        depth: so many blocks of each tower, from the first on, have prompts of their own.
    """

    depth: Annotated[int, Field(ge=1)] = 9


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding and the blocks of both towers."""
    return both.places(anatomy, config, "maple", depth=config.depth)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the first prompts among its words."""
    return both.prompted(old, config)


class Shared(both.Coupled):
    """The prompts, and what couples the image tower to them."""

    def create(self, text: int, image: int) -> None:
        """P, A and b."""
        self.prompts = nn.Parameter(torch.empty(self.depth, self.config.tokens, text).normal_(std=STD))
        first = (torch.arange(self.depth) > 0).long()
        bound = text**-0.5  # of torch's linear layers
        self.weight = nn.Parameter(torch.empty(2, image, text).uniform_(-bound, bound)[first])
        self.bias = nn.Parameter(torch.empty(2, image).uniform_(-bound, bound)[first])

    def visual(self, level: int) -> Tensor:
        """F_i(P_i)."""
        return F.linear(self.prompts[level], self.weight[level], self.bias[level])


class Graft(both.Graft):
    """The prompts of one place."""

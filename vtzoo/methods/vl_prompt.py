"""VL-prompt: deep prompts in both towers, each with its own (IVLP; Khattak et al. 2023, arXiv:2210.03117, section 4.1, and arXiv:2203.12119).

    [s, _, W] = text_block_i([s, P_i, W]),   [c, _, E] = block_i([c, V_i, E])   for i < depth

Behind these blocks what became of the last prompts goes on. P_0 stands among the words' embeddings, V_0 comes in before the norm in front
of the blocks.
Shapes: prompts P [depth, tokens, width of the text tower], V [depth, vision, width of the trunk].
Folds: no: P is in the classifier, but fresh prompts enter the image tower's blocks, which no stock architecture does.
Identity at init: no.
Parameters: depth * (tokens * text width + vision * trunk width).
Departs from the paper: as maple does: prompts take no part in pooling, all blocks have prompts where there are fewer than `depth`, and the
rest of the words that the first prompts start from stays in front of the name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

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
    """Knobs; see `Prompts`, whose `tokens` are those of the text tower.

    Attributes:
        vision: prompts in the image tower.
        depth: so many blocks of each tower, from the first on, have prompts of their own.
    """

    vision: Annotated[int, Field(ge=1)] = 2
    depth: Annotated[int, Field(ge=1)] = 12


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding and the blocks of both towers."""
    return both.places(anatomy, config, "vl-prompt", depth=config.depth, images=config.vision)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the first prompts among its words."""
    return both.prompted(old, config)


class Shared(both.Coupled):
    """The prompts of both towers."""

    def create(self, text: int, image: int) -> None:
        """P and V."""
        self.prompts = nn.Parameter(torch.empty(self.depth, self.config.tokens, text).normal_(std=STD))
        self.vision = nn.Parameter(torch.empty(self.depth, self.config.vision, image).normal_(std=STD))

    def visual(self, level: int) -> Tensor:
        """V_i."""
        return self.vision[level]


class Graft(both.Graft):
    """The prompts of one place."""

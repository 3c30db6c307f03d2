"""VPT-deep: fresh trainable tokens in front of every block (Jia et al. 2022, arXiv:2203.12119, eq. 6).

    [c, _, E] = block_i([c, P_i, E]),   c = class and register tokens, E = patch tokens

Shapes: P_i [tokens, width] per block, uniform in +- sqrt(6 / (3 patch^2 + width)).
Folds: no: fresh prompts enter every block and leave it again, which no stock architecture does.  Identity at init: no.
Parameters: tokens * width per block.
Departs from the paper: rotary position embeddings leave the prompts unrotated, like class tokens. Window attention and
relative position tables take a fixed number of tokens: Swin, Swin V2 and BEiT are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._prompts import AXES, Prompt, facts, try_out

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2203.12119"
FAMILIES = ("tokens",)
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: prompts per block; the paper sweeps 1 to 200.
        dropout: on the prompts while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 10
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every block that attends over one sequence of tokens."""
    known = facts(anatomy)
    whole = [
        b
        for b in anatomy.blocks
        if len(b.shape) == AXES - 1 and b.facts["x"] == list(b.shape) and anatomy.within(b.name, "attn")
    ]
    if not whole:
        raise UsageError(
            f"{type(anatomy.model).__name__} has no blocks that attend over one sequence, so prompts don't fit",
            "use lora, ssf or adapter instead",
        )
    found = [anatomy.module(b.name, **known) for b in whole]
    try_out(anatomy, found, Graft, config)
    return found


class Graft(Prompt):
    """The prompts of one block."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config.tokens, config.dropout)

    def enter(self, x: Tensor) -> Tensor:
        """Put the prompts behind the class and register tokens."""
        return self.insert(x)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Drop what became of them."""
        return self.drop(y)

"""Gated VPT: prompts carried from block to block, each gate deciding how far (Yoo et al. 2023, arXiv:2306.05067, sec. 4).

    [c, P_out, E'] = block_i([c, P, E]),   P' = sigmoid(g_i) P_out + (1 - sigmoid(g_i)) P

    attention_i = softmax(q k^T / (T_i sqrt(d))) v

Shapes: P [tokens, width], uniform in +- sqrt(6 / (3 patch^2 + width)); g_i [1] in all blocks but the last, T_i [1] in each.
Folds: no: no stock architecture mixes a block's output tokens with its input tokens.  Identity at init: no.
Parameters: tokens * width + 2 * blocks - 1.
Departs from the paper: prompts take no part in pooling; rotary position embeddings leave them unrotated; gates start at
sigmoid(-5) (the paper's code takes any, 10 unless told) and learn `plus` times as fast as the head, or a short training could not
open them. The limits of T (0.01 and 10) are those of the paper's code; there T is clamped where it is stored, here where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._attend import Attending
from vtzoo.methods._plain import attentions
from vtzoo.methods._prompts import AXES, Prompt, facts, fits

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2306.05067"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 0.0}}
BEFORE = "norm_pre"
COLDEST, HOTTEST = 0.01, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: how many prompts.
        gate: the gates start at sigmoid(-gate).
        plus: factor of the gates' learning rate.
        dropout: on the prompts while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 20
    gate: float = 5.0
    plus: Annotated[float, Field(gt=0)] = 20.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Where the prompts come in, the blocks they pass, and the attentions of these."""
    seen, known = anatomy.seen.get(BEFORE), facts(anatomy)
    row = [b for b in anatomy.blocks if seen and anatomy.seen[b.name].x == anatomy.seen[b.name].y == seen.y]
    if not row or len(row) < len(anatomy.blocks) or len(row[0].shape) != AXES - 1:
        raise UsageError(
            f"{type(anatomy.model).__name__} does not take one sequence from a layer '{BEFORE}' through all its blocks, so gated prompts don't fit",
            "use vpt-deep instead",
        )
    warm = [replace(s, facts={**known, "role": "warm"}) for s, _ in attentions(anatomy, "gated prompts")]
    blocks = [anatomy.module(b.name, **known, role="last" if b is row[-1] else "gate") for b in row]
    found = [anatomy.module(BEFORE, **known, role="first"), *blocks, *warm]
    if not fits(anatomy, found, Graft, config):
        raise UsageError(
            f"the blocks of {type(anatomy.model).__name__} take a fixed number of tokens, so gated prompts don't fit",
            "use vpt-deep instead",
        )
    return found


class Graft(Prompt, Attending):
    """By its role: the prompts where they come in, a block's gate, their end, or an attention's temperature."""

    def __init__(self, site: Site, config: Config) -> None:
        self.role: str = site.facts["role"]
        super().__init__(site, config.tokens, config.dropout, own=self.role == "first")
        self.rewrites = self.role == "warm"
        if self.role == "gate":
            self.gate, self.rates = nn.Parameter(torch.full((1,), -config.gate)), {"gate": config.plus}
        if self.role == "warm":
            self.temperature = nn.Parameter(torch.ones(1))

    def enter(self, x: Tensor) -> Tensor:
        """Put the prompts behind the class and register tokens."""
        return self.insert(x) if self.role == "first" else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Let them change as far as the gate is open; drop them in the end."""
        if self.role == "last":
            return self.drop(y)
        if self.role != "gate":
            return y
        start, stop = self.at, self.at + self.tokens
        mixed = torch.lerp(x[:, start:stop], y[:, start:stop], self.gate.sigmoid())
        return torch.cat([y[:, :start], mixed, y[:, stop:]], dim=1)

    def query(self, q: Tensor) -> Tensor:
        """Divide the scores by the temperature."""
        return q / self.temperature.clamp(COLDEST, HOTTEST)

    def bind(self, host: nn.Module) -> None:
        """Count the prompts as prefix, in blocks."""
        if self.role in ("gate", "last"):
            super().bind(host)

    def release(self, host: nn.Module) -> None:
        """Count as before."""
        if self.role in ("gate", "last"):
            super().release(host)

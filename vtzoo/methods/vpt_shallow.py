"""VPT-shallow: trainable tokens beside the patches, through all blocks (Jia et al. 2022, arXiv:2203.12119, eq. 4-5).

    [c, _, E'] = norm(blocks(norm_pre([c, P, E])))        fold:  register tokens' = [registers, P]

Shapes: P [tokens, width], uniform in +- sqrt(6 / (3 patch^2 + width)).
Folds: exactly (as register tokens of the same timm class; its position embedding has zeros at their rows).
Identity at init: no.
Parameters: tokens * width.
Departs from the paper: prompts take no part in pooling, as registers don't; rotary position embeddings leave them
unrotated, like class tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.folding import Folded
from vtzoo.methods._prompts import AXES, Prompt, counting, facts
from vtzoo.tensors import shape_of, working

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2203.12119"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 1e-1, "weight_decay": 1e-4}}
BEFORE, AFTER = "norm_pre", "norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: how many; the paper sweeps 1 to 200.
        dropout: on the prompts while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 20
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """Where the tokens come in, where they go out, and the attentions that count them."""
    model, seen = anatomy.model, anatomy.seen
    known = inspect.signature(type(model).__init__).parameters
    argument = next((a for a in ("reg_tokens", "num_reg_tokens") if a in known), "")
    ends = [n in seen and len(seen[n].x) == AXES and seen[n].x == seen[n].y for n in (BEFORE, AFTER)]
    if not argument or not hasattr(model, "reg_token") or not all(ends):
        raise UsageError(
            f"{type(model).__name__} has no register tokens to fold prompts into, so shallow prompts don't fit",
            "use lora, ssf or adapter instead; vpt-deep asks less of a transformer",
        )
    if getattr(model, "pool_include_prefix", getattr(model, "attn_pool", None) is not None):  # EVA's pools over all
        raise UsageError(
            "this backbone pools over its register tokens too, and with them over prompts folded into them",
            "use vpt-deep",
        )
    embedded = "pos_embed" in graft.own_parameters(model) and not getattr(model, "no_embed_class", False)
    about = {**facts(anatomy), "argument": argument, "embedded": embedded}
    between = [b.name for b in anatomy.blocks if counting(anatomy.modules[b.name])]
    return [anatomy.module(n, **about) for n in (BEFORE, *between, AFTER)]


class Graft(Prompt):
    """The prompts where they come in; elsewhere a helper without tensors."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config.tokens, config.dropout, own=site.name == BEFORE)
        self.place = site.name

    def enter(self, x: Tensor) -> Tensor:
        """Put the prompts behind the class and register tokens."""
        return self.insert(x) if self.place == BEFORE else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Drop what became of them."""
        return self.drop(y) if self.place == AFTER else y


def fold(base: Folded, delta: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site], config: Config) -> Folded:
    """Append the prompts to the register tokens, and give each a row of zeros in the position embedding."""
    prompt, known = delta[BEFORE]["prompt"], sites[0].facts
    width, at = prompt.shape[-1], int(known["prefix"])
    had = shape_of(base, "reg_token")[1] if "reg_token" in base else 0

    def registers() -> Tensor:
        kind = working(prompt)
        old = [base["reg_token"].to(kind)] if had else []
        return torch.cat([*old, prompt.to(kind)[None]], dim=1)

    def positions() -> Tensor:
        old = base["pos_embed"]
        return torch.cat([old[:, :at], old.new_zeros(1, config.tokens, width), old[:, at:]], dim=1)

    makers, shapes = {"reg_token": registers}, {"reg_token": (1, had + config.tokens, width)}
    if known["embedded"]:
        makers["pos_embed"] = positions
        shapes["pos_embed"] = (1, shape_of(base, "pos_embed")[1] + config.tokens, width)
    return Folded(base, makers, shapes, {known["argument"]: had + config.tokens})

"""E2VPT: prompts before every block, and as keys and values in its attention, pruned (Han et al. 2023, arXiv:2307.13770, eq. 3-8).

    attention = softmax(q [K_P, k_P, k]^T / sqrt(d)) [V_P, v_P, v],   k_P, v_P = projections of norm(P * mask)

    mask = token mask x segment mask, of which the entries smallest in size are zero

Shapes: P [tokens, width], K_P and V_P [heads, keys, head width] per block; token mask [tokens], segment mask [tokens, segments],
the same for all blocks.
Folds: no: no stock attention has keys and values of its own.  Identity at init: no.
Parameters: tokens * width + keys * width per block (twice keys * width with share=false), tokens * (1 + segments) once.
Departs from the paper: nothing is trained twice: the masks learn along with the prompts, the share that is pruned is theirs
that are smallest in size at the moment, and a pruned part goes on learning as if its mask were not zero (straight-through), so that
it may come back; the paper prunes by the masks' gradients after training, then rewinds. A segment is a run of neighbouring channels
(the paper's code takes every n-th). Nothing is pruned unless
asked for: a short training can't tell what to lose. Key prompts pass the norm of the keys where there is one. As in the paper's code, keys and values share one
tensor (share=true), a pruned prompt stays as zeros, and input prompts act by keys and values alone, which is all that fresh prompts can do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._prompts import Beside, Norms, beside, drawn

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2307.13770"
FAMILIES = ("tokens",)
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: input prompts per block.
        keys: key and value prompts per attention.
        share: one tensor is both keys and values.
        segments: into which the channels of an input prompt are cut; no more than the widest block has channels.
        prune_tokens: fraction of the input prompts that is pruned; one stays at least.
        prune_segments: fraction of each input prompt's segments that is pruned; one stays at least.
        dropout: on the input prompts while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 10
    keys: Annotated[int, Field(ge=1)] = 5
    share: bool = True
    segments: Annotated[int, Field(ge=1)] = 16
    prune_tokens: Annotated[float, Field(ge=0, lt=1)] = 0.0
    prune_segments: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The attention of every block.

    Raises:
        UsageError: more segments than the widest block has channels.
    """
    found = beside(anatomy)
    if config.segments > (width := max(s.shape[-1] for s in found)):
        raise UsageError(f"segments={config.segments}, and a prompt has {width} channels to cut", f"{width} at most")
    return found


class Shared(Norms):
    """The masks of the input prompts."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__(sites, config)
        self.config = config
        self.token_mask = nn.Parameter(torch.ones(config.tokens))
        self.undecayed = ("segment_mask",)
        self.segment_mask = nn.Parameter(torch.ones(config.tokens, config.segments))

    def mask(self, width: int) -> Tensor:
        """[tokens, width]."""
        config = self.config
        whole = _pruned(self.token_mask, config.prune_tokens)[:, None] * _pruned(
            self.segment_mask, config.prune_segments
        )
        return whole[:, torch.arange(width, device=whole.device) * config.segments // width]


class Graft(Beside):
    """The prompts of one attention."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.name, self.dropout = site.name, config.dropout
        self.prompt = drawn(site, config.tokens)
        shape = site.facts["heads"], config.keys, site.facts["head_width"]
        bound = math.sqrt(6.0 / (shape[1] * shape[2]))
        self.keys = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.values = None if config.share else nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def prompts(self) -> Tensor:
        """The input prompts with their mask."""
        return super().prompts() * self.shared.mask(self.prompt.shape[-1])

    def more(self, host: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
        """Both kinds."""
        return [*super().more(host), (self.keys, self.keys if self.values is None else self.values)]


def _pruned(mask: Tensor, fraction: float) -> Tensor:
    """The entries of the last axis that are smallest in size become zero, but learn as if they were not."""
    count = max(1, round((1 - fraction) * mask.shape[-1]))
    if count == mask.shape[-1]:
        return mask
    kept = torch.zeros_like(mask).scatter(-1, mask.abs().topk(count).indices, 1.0)
    return mask * kept + (mask - mask.detach()) * (1 - kept)

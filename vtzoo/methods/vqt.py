"""VQT: prompts that only ask: each block's queries, collected for the head (Tu et al. 2023, arXiv:2212.03220, eq. 5-7).

    Z_i = block_i(P_i looking at x_i),   x_{i+1} = block_i(x_i),   f' = f + sum_i sum_j w_ij * Z_ij / rms(Z_ij)

Shapes: P_i [tokens, width] per block, uniform in +- sqrt(6 / (3 patch^2 + width)); w_i [tokens, width], 1 / (blocks * tokens).
Folds: no: what the queries find is added to the features in the end.  Identity at init: no.
Parameters: 2 * tokens * width per block.
Departs from the paper: its head takes the backbone's features and all Z_i side by side, each normalised; here they are summed with a weight
per query and channel, so that the head keeps its size (the paper's code has a sum with a weight per query too). Each is
scaled to a mean square of 1, not to length 1. Queries have no position. The sum is added to the tokens
behind the last norm, before they are pooled. As in the paper the backbone's features stay what they are and no gradient
passes from block to block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._attend import looking
from vtzoo.methods._plain import plain_blocks
from vtzoo.methods._prompts import AXES, drawn, facts
from vtzoo.methods._side import thread

GROUP = "adapter/mix"
PAPER = "arXiv:2212.03220"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 1e-4}}
AFTER = "norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        tokens: queries per block.
        dropout: on them while training.
    """

    tokens: Annotated[int, Field(ge=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """The blocks, and the norm behind them."""
    blocks, after = plain_blocks(anatomy, "query prompts"), anatomy.seen.get(AFTER)
    if after is None or len(after.y) != AXES:
        raise UsageError(
            f"{type(anatomy.model).__name__} has no norm behind its blocks where what queries find could be added",
            "use vpt-deep instead",
        )
    about = {**facts(anatomy), "blocks": len(blocks)}
    return [*(replace(b, facts={**b.facts, **about, "index": i}) for i, b in enumerate(blocks)), anatomy.module(AFTER)]


class Shared(graft.Shared):
    """What the queries found so far, within one forward."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:  # noqa: ARG002 - every Shared takes both
        super().__init__()
        self.found: dict[int, list[Tensor]] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": {}}


class Graft(graft.Graft):
    """The queries of one block; behind the last norm, where the sum is added."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.index: int = site.facts.get("index", -1)
        self.rewrites, self.dropout = self.index >= 0, config.dropout
        self.aside = self.rewrites
        if self.rewrites:
            self.prompt = drawn(site, config.tokens)
            share = 1.0 / (config.tokens * site.facts["blocks"])
            self.undecayed = ("weight",)
            self.weight = nn.Parameter(torch.full((config.tokens, site.shape[-1]), share))

    def around(self, host: nn.Module, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on its tokens, then on the queries, which see the same tokens."""
        if self.index == 0:
            self.shared.found[thread()] = []
        queries = F.dropout(self.prompt.expand(x.shape[0], -1, -1), self.dropout, self.training)
        z = looking(host, queries, x, *args, **kwargs)
        self.shared.found.setdefault(thread(), []).append((self.weight * F.rms_norm(z, z.shape[-1:])).sum(1))
        return run(x, *args, **kwargs)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Add what was found to every token."""
        if self.rewrites:
            return y
        found = torch.stack(self.shared.found.pop(thread())).sum(0)
        return y + found[: y.shape[0], None]  # another method may have dropped images of its own

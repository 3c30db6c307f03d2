"""SA2VP: a map of prompts, aligned with the patches, runs beside them and both look at each other (Pei et al. 2023, arXiv:2312.10376).

    P_0 = A B + b + positions,   P_{i+1} = block_i(P_i),   x_{i+1} = block_i(x_i) + scale * F_i(x_i, P_i)

    F_i(q, kv) = U gelu(D norm(q + attention_i(q, kv near q)) + d) + u

At the first block of every third of the net F_i(P_i, x_i) goes to the prompts instead, so that they adapt to the image. The
attention is the block's own, a patch seeing the 3 x 3 patches around its place, other tokens everything.
Shapes: A [patches, rank], B [width, rank], b [width]; per block norm [width] twice, D [rank, width], d [rank], U [width, rank], u [width].
Folds: no: every block runs twice and an activation stands between.  Identity at init: no.
Parameters: patches * rank + (rank + 1) * width, and 2 * rank * width + rank + 3 * width per block.
Departs from the paper: the loss on the prompts' own prediction is left out, as a training here has one output; so are the further maps that its
code adds inside the net. The prompts have the backbone's class token, not one of their own. The
attention has the block's heads (the code's has one head, as wide as the tokens), and at the border fewer places (the code pads
with zeros, which take part). In a net of few blocks a third
has two blocks at least, and the last block always gives to the image. Images have one size. Relied on: the paper's code (tommy-xq/SA2VP).
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
from vtzoo.methods._attend import heads, look, output
from vtzoo.methods._plain import plain_blocks

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2312.10376"
FAMILIES = ("tokens",)
INTERMEDIATES = False
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}}
BEFORE, AFTER = "patch_embed", "norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width in which the map and each bottleneck are stored.
        scale: of what one branch gives to the other.
        dropout: on that while training.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    scale: Annotated[float, Field(gt=0)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """The patch embedding, the blocks, and the norm behind them."""
    blocks = plain_blocks(anatomy, "maps of prompts")
    grid = list(getattr(anatomy.modules.get(BEFORE), "grid_size", None) or ())
    if len(grid) != 2 or BEFORE not in anatomy.seen or AFTER not in anatomy.seen:
        raise UsageError(
            f"{type(anatomy.model).__name__} has no grid of patches to align prompts with", "use vpt-deep instead"
        )
    third = max(2, round(len(blocks) / 3))
    give = [i % third == 0 and i < len(blocks) - 1 for i in range(len(blocks))]
    inside = [replace(b, facts={**b.facts, "to_prompts": g}) for b, g in zip(blocks, give, strict=True)]
    return [anatomy.module(BEFORE, grid=grid), *inside, anatomy.module(AFTER)]


class Shared(graft.Shared):
    """Which patches are neighbours."""

    near: Tensor

    def __init__(self, sites: Sequence[Site], config: Config) -> None:  # noqa: ARG002 - every Shared takes both
        super().__init__()
        height, width = sites[0].facts["grid"]
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        far = (places[:, None] - places[None]).abs().amax(-1)
        self.register_buffer("near", far <= 1, persistent=False)

    def mask(self, tokens: int) -> Tensor:
        """Who sees whom, [tokens, tokens]: patches, which come last, their neighbours; those before them all."""
        before = tokens - self.near.shape[0]
        return torch.cat([self.near.new_ones(before, tokens), F.pad(self.near, (before, 0))])


class Graft(graft.Graft):
    """By its place: the map, the bottleneck of one block, or where the map ends."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.place, self.scale, self.dropout = site.name, config.scale, config.dropout
        self.rewrites, width, rank = "to_prompts" in site.facts, site.shape[-1], config.rank
        if self.place == BEFORE:
            height, across = site.facts["grid"]
            self.map = nn.Parameter(nn.init.trunc_normal_(torch.empty(height * across, rank), std=0.02))
            self.up, self.up_bias = _layer(rank, width)
        if self.rewrites:
            self.to_prompts: bool = site.facts["to_prompts"]
            self.norm, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
            self.down, self.down_bias = _layer(width, rank)
            self.up, self.up_bias = _layer(rank, width)

    def enter(self, x: Tensor) -> Tensor:
        """Drop the prompts in the end."""
        return x.unflatten(0, (2, -1))[0] if self.place == AFTER else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Put the prompts beside the patches: as further images, so that every block takes them too."""
        if self.place != BEFORE:
            return y
        prompts = F.linear(self.map, self.up, self.up_bias).reshape(y.shape[1:])
        return torch.cat([y, prompts.expand(y.shape)])

    def around(self, host: Any, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on both, then let one look at the other."""
        y = run(x, *args, **kwargs)
        asks, other = (1, 0) if self.to_prompts else (0, 1)
        parts = heads(host.attn, normed := host.norm1(x), rope=kwargs.get("rope"))
        q, k, v = (t.unflatten(0, (2, -1)) for t in parts)
        seen = look(host.attn, q[asks], k[other], v[other], self.shared.mask(x.shape[1]))
        own = x.unflatten(0, (2, -1))[asks] + output(host.attn, normed.unflatten(0, (2, -1))[asks], seen)
        given = self.scale * self.bottleneck(own)
        images, prompts = y.unflatten(0, (2, -1))
        return torch.cat([images, prompts + given] if self.to_prompts else [images + given, prompts])

    def bottleneck(self, x: Tensor) -> Tensor:
        """Norm, down, activation, up."""
        x = F.layer_norm(x, x.shape[-1:], self.norm, self.norm_bias, eps=1e-6)
        x = F.linear(F.gelu(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)
        return F.dropout(x, self.dropout, self.training)


def _layer(inside: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [out, inside], Xavier-uniform, and a bias near zero."""
    weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out, inside)))
    return weight, nn.Parameter(torch.empty(out).normal_(0.0, 1e-6))

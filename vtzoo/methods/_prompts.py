"""Shared by the methods that put trainable tokens into a sequence, behind its class and register tokens."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site, probe
from vtzoo.errors import UsageError

AXES = 3  # of a sequence: batch, tokens, width


class Prompt(graft.Graft):
    """`tokens` trainable tokens, uniform in +- sqrt(6 / (pixels of a patch + width)); see `insert`.

    Rotary attentions count the tokens that they leave unrotated: that count grows while the graft hangs.
    """

    def __init__(self, site: Site, tokens: int, dropout: float, *, own: bool = True) -> None:
        super().__init__()
        self.at, self.tokens, self.dropout = int(site.facts["prefix"]), tokens, dropout
        if own:
            width = site.shape[-1]
            bound = math.sqrt(6.0 / (site.facts["patch"] + width))
            self.prompt = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))

    def insert(self, x: Tensor) -> Tensor:
        """[batch, n, width] -> [batch, n + tokens, width]."""
        prompt = F.dropout(self.prompt.expand(x.shape[0], -1, -1), self.dropout, self.training)
        return torch.cat([x[:, : self.at], prompt, x[:, self.at :]], dim=1)

    def drop(self, y: Tensor) -> Tensor:
        """[batch, n + tokens, width] -> [batch, n, width]."""
        return torch.cat([y[:, : self.at], y[:, self.at + self.tokens :]], dim=1)

    def bind(self, host: nn.Module) -> None:
        """Count the prompts as prefix."""
        for module in counting(host):
            module.num_prefix_tokens += self.tokens

    def release(self, host: nn.Module) -> None:
        """Count as before."""
        for module in counting(host):
            module.num_prefix_tokens -= self.tokens


def counting(host: nn.Module) -> list[Any]:
    """The modules inside (rotary attentions) that know how many tokens stand in front of the patches."""
    return [m for m in host.modules() if "num_prefix_tokens" in m.__dict__]


def facts(anatomy: Anatomy) -> dict[str, int]:
    """What a prompt needs to know: where it stands, and how many numbers a patch has."""
    weight = graft.own_parameters(anatomy.modules[anatomy.stem]).get("weight")
    return {"prefix": anatomy.prefix, "patch": 0 if weight is None else math.prod(weight.shape[1:])}


def try_out(anatomy: Anatomy, sites: Sequence[Site], made: type[graft.Graft], config: Any) -> None:
    """Run one image with the prompts in place, and take them off again.

    Raises:
        UsageError: some layer takes a fixed number of tokens.
    """
    hosts = [anatomy.modules[s.name] for s in sites]
    like = next(anatomy.model.parameters())
    try:
        for host, site in zip(hosts, sites, strict=True):
            graft.graft(host, "trial", made(site, config).to(like.device, like.dtype).eval())
        probe(anatomy.model)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UsageError(
            f"the blocks of {type(anatomy.model).__name__} take a fixed number of tokens, so prompts don't fit",
            "use lora, ssf or adapter instead",
        ) from error
    finally:
        for host in hosts:
            graft.prune(host)

"""Shared by the methods that put trainable tokens into a sequence, behind its class and register tokens, or beside its attention."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._attend import Attending, project
from vtzoo.methods._plain import attentions
from vtzoo.probing import probe

AXES = 3  # of a sequence: batch, tokens, width


class Prompt(graft.Graft):
    """Trainable tokens in the sequence; see `insert`.

    Rotary attentions count the tokens that they leave unrotated: that count grows while the graft hangs.
    """

    def __init__(self, site: Site, tokens: int, dropout: float, *, own: bool = True) -> None:
        super().__init__()
        self.at, self.tokens, self.dropout = int(site.facts["prefix"]), tokens, dropout
        if own:
            self.prompt = drawn(site, tokens)

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


def drawn(site: Site, tokens: int) -> nn.Parameter:
    """Prompts [tokens, width], uniform in +- sqrt(6 / (pixels of a patch + width))."""
    width = site.shape[-1]
    bound = math.sqrt(6.0 / (site.facts["patch"] + width))
    return nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))


class Norms(graft.Shared):
    """Knows the norms that stand before attentions, since prompts that enter there pass them too."""

    def __init__(self, sites: Sequence[Site], config: object = None) -> None:  # noqa: ARG002 - every Shared takes both
        super().__init__()
        self.names = {s.name: s.facts["norm"] for s in sites if s.facts.get("norm")}

    def bind(self, host: nn.Module) -> None:
        """Find them."""
        self.__dict__["norms"] = {site: host.get_submodule(norm) for site, norm in self.names.items()}

    def release(self, host: nn.Module) -> None:  # noqa: ARG002 - the interface
        """Forget them."""
        del self.__dict__["norms"]


class Beside(Attending):
    """Prompts that the queries of one attention see, and nothing else does.

    That is what a block's fresh prompts come to, since what becomes of them is dropped behind it; and it asks no more of
    windows, relative positions and maps than that they leave further keys alone.
    """

    name: str
    dropout: float
    prompt: nn.Parameter

    def prompts(self) -> Tensor:
        """[tokens, width]."""
        return F.dropout(self.prompt, self.dropout, self.training)

    def more(self, host: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
        """The keys and values that the host makes of them."""
        norm, tokens = self.shared.norms.get(self.name), self.prompts()
        return [project(host, tokens if norm is None else norm(tokens[None])[0])]


def beside(anatomy: Anatomy) -> list[Site]:
    """The attentions that prompts can stand beside, with the norm before each.

    Raises:
        UsageError: there are none, or they are not plain.
    """
    found = attentions(anatomy, "prompts")
    return [replace(s, facts={**s.facts, **facts(anatomy), "norm": norm}) for s, norm in found]


def fits(anatomy: Anatomy, sites: Sequence[Site], made: Callable[[Site, Any], graft.Graft], config: Any) -> bool:
    """Whether the model runs with the prompts in place; they are taken off again."""
    hosts = [anatomy.modules[s.name] for s in sites]
    like = next(anatomy.model.parameters())
    try:
        for host, site in zip(hosts, sites, strict=True):
            graft.graft(host, "trial", made(site, config).to(like.device, like.dtype).eval())
        probe(anatomy.model)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False
    finally:
        for host in hosts:
            graft.prune(host)
    return bool(sites)

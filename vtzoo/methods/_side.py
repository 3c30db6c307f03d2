"""Shared by the side networks: what passes from graft to graft within one forward, and where such a network joins."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import CONTAINERS
from vtzoo.probing import evaluating, input_size

SEQUENCE, MAP = 3, 4  # axes of [batch, tokens, width] and of a map


class Carrier(graft.Shared):
    """Hands a value from graft to graft within one `forward_features`, thread by thread.

    The first graft of a forward puts without taking, so what an interrupted one left is overwritten; the last takes
    without putting. Copies and pickles carry nothing.
    """

    def __init__(self, sites: Sequence[Site] = (), config: object = None) -> None:  # noqa: ARG002 - the interface
        super().__init__()
        self.held: dict[int, Any] = {}

    def put(self, value: Any) -> None:
        """Keep a value for the next graft."""
        self.held[thread()] = value

    def take(self) -> Any:
        """The value that the graft before put.

        Raises:
            UsageError: none did, since a part of the backbone was called on its own, as activation checkpointing does.
        """
        value = self.held.pop(thread(), None)
        if value is None:
            raise UsageError(
                "a side network is fed on the way through the whole model, and a part of it was called by itself",
                "call the whole model, with activation checkpointing off",
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}


def thread() -> int:
    """By what two forwards at the same time are told apart; a compiled graph knows one only."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def at(anatomy: Anatomy, name: str, **facts: Any) -> Site:
    """A called module as a site that knows its channel axis, and how many tokens stand before the patches."""
    return anatomy.module(name, axis=anatomy.channel_axis(name), before=anatomy.prefix, **facts)


def places(site: Site) -> tuple[int, ...]:
    """The shape of a site's output without its channels."""
    return site.shape[:-1] if site.facts["axis"] == -1 else site.shape[1:]


def whole(anatomy: Anatomy) -> list[Site]:
    """The blocks through which each image passes once, as a sequence or a map."""
    seen = anatomy.seen
    names = [b.name for b in anatomy.blocks if len(b.shape) + 1 in (SEQUENCE, MAP) and seen[b.name].calls == 1]
    return [at(anatomy, n) for n in names if seen[n].x[0] == seen[n].y[0] == 1]


def keeps(site: Site) -> bool:
    """Whether a block's output has its input's shape."""
    return site.facts["x"] == list(site.shape)


@torch.no_grad()
def ending(anatomy: Anatomy) -> Site:
    """The last module of `forward_features`: what it gives is what the pooling and the classifier are given.

    Raises:
        UsageError: no module's output is the features themselves.
    """
    model: Any = anatomy.model
    given: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, _args, y: given.__setitem__(name, y)

    inside = {n: m for n, m in anatomy.modules.items() if n in anatomy.seen and not isinstance(m, CONTAINERS)}
    like = next(model.parameters())
    handles = [m.register_forward_hook(note(n)) for n, m in inside.items()]
    try:
        with evaluating(model):
            features = model.forward_features(torch.zeros(1, *input_size(model)).to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    name = next((n for n in reversed(given) if given[n] is features), None)
    if name is None:
        raise UsageError(
            f"what {type(model).__name__} hands to its classifier is no module's output, so nothing can be joined there",
            "use adapter or lora instead",
        )
    return at(anatomy, name)


def joined(sites: Sequence[Site], end: Site) -> list[Site]:
    """The sites and the end; one site where the last block is the end."""
    marked = {"end": True}
    merged = [replace(s, facts={**s.facts, **marked}) if s.name == end.name else s for s in sites]
    alone = end.name not in {s.name for s in sites}
    return [*merged, replace(end, facts={**end.facts, **marked})] if alone else merged


def raster(anatomy: Anatomy, site: Site) -> tuple[int, int] | None:
    """Rows and columns of a sequence's last tokens, the patches.

    None where they don't lie row by row (Hiera's go window by window), or where the net takes images of any size.
    """
    height, width = anatomy.seen[anatomy.stem].x[2:]
    sized = any(getattr(m, "img_size", None) is not None for m in anatomy.modules.values())
    if len(site.shape) + 1 != SEQUENCE or not sized or hasattr(anatomy.model, "unroll"):
        return None
    for before in (anatomy.prefix, 0):
        count = max(site.shape[0] - before, 0)
        rows, columns = round((count * height / width) ** 0.5), round((count * width / height) ** 0.5)
        if rows and rows * columns == count:
            return rows, columns
    return None


def placed(v: Tensor, like: Tensor, axis: int) -> Tensor:
    """[batch, …, channels] as what can be added to features whose channels lie on `axis`.

    Place by place where the places agree, else by the mean over them; [batch, channels] has none. Prompts that another
    method put among the tokens, or behind the images as further ones, count in that mean, or are left out.
    """
    v = v if v.shape[0] == like.shape[0] else v[: like.shape[0]]
    if v.shape[1:-1] == like.movedim(axis, -1).shape[1:-1]:
        return v.movedim(-1, axis)
    v = v.reshape(v.shape[0], -1, v.shape[-1]).mean(1)
    return v.reshape(v.shape[0], *[1] * (like.ndim - 2), v.shape[-1]).movedim(-1, axis)


def aligned(h: Tensor, like: Tensor, before: int) -> Tensor:
    """h [batch, tokens, …] with as many tokens as `like`.

    Prompts of another method stand behind the first `before` tokens; where they came or went since, theirs are zeros or
    dropped.
    """
    more = like.shape[1] - h.shape[1]
    if not more:
        return h
    between = h.new_zeros(h.shape[0], max(more, 0), *h.shape[2:])
    return torch.cat([h[:, :before], between, h[:, before + max(-more, 0) :]], dim=1)


def convolution(into: int, out: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    """A convolution, a norm of two groups, since a delta owns no statistics, and ReLU."""
    conv = nn.Conv2d(into, out, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.GroupNorm(2, out), nn.ReLU())


def silent(into: int, out: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    made = nn.Linear(into, out)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made

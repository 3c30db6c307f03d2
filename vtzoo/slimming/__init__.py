"""A smaller network out of a tuned one: what its task depends on least is left out (structured pruning).

    importance of a unit = sum over its entries of  E[g^2] w^2        (how much the loss rises when they are zero, with the Fisher information for the
                                                                       Hessian: Theis et al. 2018, arXiv:1801.05787, eq. 7, less the constant)
    importance of a block = 1 - cosine of the features with the block and without it

Units (hidden ones, attention heads, channels) are put in the order of their importance, which changes nothing, and the first of each group are taken; of
the blocks the most important. So the student is a stock network with other arguments, which timm builds.
Of all sizes that keep a budget those are taken that leave out least: the sum over hidden units, width and blocks of the share of their
importance that goes. What there is to know of a kind of network stands in a file of its own here: its `frame`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import talk
from vtzoo.backbone import create
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.initial import started
from vtzoo.probing import evaluating, input_size, work
from vtzoo.sensitivity import Batches, scores
from vtzoo.slimming import _convnext, _resnet, _vit
from vtzoo.slimming._frame import Frame, Member, Sizes

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
FRAMES = (_vit.frame, _resnet.frame, _convnext.frame)
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Of hidden units and of widths that are no heads, of which one is tried after the other."""
LEAST = 0.25
"""The share of blocks and heads that is left at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slim:
    """How small: a budget, or sizes.

    Attributes:
        params: share of the parameters that may be left.
        macs: share of the multiply-adds.
        depth: blocks.
        width: share of the channels, of a transformer in whole heads.
        hidden: share of the units of each block's MLP, in transformers.
    """

    params: Share | None = None
    macs: Share | None = None
    depth: Count | None = None
    width: Share | None = None
    hidden: Share | None = None

    def __post_init__(self) -> None:
        """Refuse no wish at all, and a budget with sizes."""
        budget = [b for b in (self.params, self.macs) if b is not None]
        sizes = [s for s in (self.depth, self.width, self.hidden) if s is not None]
        if not budget and not sizes:
            raise ValueError("say how small, such as slim[macs=0.5] or slim[depth=8,width=0.75]")
        if budget and sizes:
            raise ValueError("give a budget (params, macs) or sizes (depth, width, hidden)")


@dataclass(frozen=True)
class Ranks:
    """Units in falling order of importance, and how much each of them has, by kind and group; and how much each block has."""

    orders: Mapping[str, Sequence[Tensor]]
    weights: Mapping[str, Sequence[Tensor]]
    blocks: Mapping[str, float]

    def lost(self, kind: str, share: float) -> float:
        """Which share of a kind's importance is left out when so many of the most important units stay, mean over groups."""
        weights = self.weights.get(kind, ())
        gone = [1 - float(w[: round(share * len(w))].sum() / w.sum().clamp(min=1e-30)) for w in weights]
        return sum(gone) / max(1, len(gone))

    def least(self, count: int) -> list[str]:
        """So many of the blocks that matter least."""
        return sorted(self.blocks, key=self.blocks.__getitem__)[:count]


def slimmed(
    model: nn.Module, arch: str, args: Mapping[str, Any], wish: Slim, batches: Batches
) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller network, and the arguments with which timm builds it.

    Args:
        model: plain; it stays as it is.
        arch: its name in timm.
        args: with which it was built.
        wish: how small.
        batches: labelled images [n, 3, h, w], by which importance is told.

    Raises:
        ShapeMismatch: networks of this kind can't be slimmed.
        UsageError: nothing of the kind is as small, or more was asked for than there is.
    """
    frame, images = _frame(model), list(batches)
    ranks = _ranks(model, frame, images)
    sizes = _chosen(model, frame, arch, args, wish, ranks)
    gone = ranks.least(frame.depth - sizes.depth)
    own = {**args, **frame.arguments(sizes, gone)}
    made = create(arch, pretrained=False, num_classes=int(getattr(model, "num_classes", 0)), **own)
    started(
        made, _arranged(model, frame, ranks, gone), "weight-selection[layers=first,elements=first]", name=f"the {arch}"
    )
    talk.say(
        f"slimmed to {sizes.depth} of {frame.depth} blocks, {sizes.width:.0%} of the width, {sizes.hidden:.0%} of the hidden units"
    )
    return made.eval(), own


def _frame(model: nn.Module) -> Frame:
    """What is known of a network.

    Raises:
        ShapeMismatch: nothing.
    """
    found = next((f for make in FRAMES if (f := make(model)) is not None), None)
    if found is None:
        raise ShapeMismatch(
            f"slim takes plain vision transformers, ResNets and ConvNeXts apart, and this {type(model).__name__} is none",
            "give the student's architecture, and its first weights with --init weight-selection",
        )
    return found


def _ranks(model: nn.Module, frame: Frame, batches: Batches) -> Ranks:
    """How important every unit and block is."""
    weighed = {n: s * model.get_parameter(n).detach().square().to(s) for n, s in scores(model, batches).items()}
    orders: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}
    for kind, groups in frame.groups.items():
        for group in groups:
            parts = [_along(m, weighed[m.name]).sum(1).double() for m in group if m.name in weighed]
            found = torch.stack(parts).sum(0)
            orders.setdefault(kind, []).append(found.argsort(descending=True, stable=True))
            weights.setdefault(kind, []).append(found[orders[kind][-1]])
    return Ranks(orders, weights, _without(model, frame, batches))


def _along(member: Member, value: Tensor) -> Tensor:
    """A tensor with its group's units in front, [units, rest]."""
    apart = value.unflatten(member.dim, member.parts)
    return apart.movedim(member.dim + member.at, 0).reshape(member.parts[member.at], -1)


def _arranged(model: nn.Module, frame: Frame, ranks: Ranks, gone: Sequence[str]) -> nn.Module:
    """The network with the most important units in front, and the blocks that go at the end of their stage."""
    state = dict(model.state_dict())
    for kind, groups in frame.groups.items():
        for group, order in zip(groups, ranks.orders[kind], strict=True):
            for m in group:
                apart = (
                    state[m.name].unflatten(m.dim, m.parts).index_select(m.dim + m.at, order.to(state[m.name].device))
                )
                state[m.name] = apart.flatten(m.dim, m.dim + len(m.parts) - 1)
    new: dict[str, str] = {}
    for row in frame.rows:
        new |= dict(zip(sorted(row, key=lambda b: b in gone), row, strict=True))
    found = deepcopy(model)
    found.load_state_dict({_renamed(n, new): t for n, t in state.items()})
    return found


def _renamed(name: str, new: Mapping[str, str]) -> str:
    block = next((b for b in new if name.startswith(f"{b}.")), "")
    return new[block] + name.removeprefix(block) if block else name


@torch.no_grad()
def _without(model: nn.Module, frame: Frame, batches: Batches) -> dict[str, float]:
    """How far the features turn when each block is left out, on every fourth image: a pass for each block is what takes longest."""
    turned = dict.fromkeys(frame.spare, 0.0)
    with evaluating(model):
        for every, _ in batches:
            images = every[::4]
            whole = _features(model, images)
            for name in turned:
                hook = model.get_submodule(name).register_forward_hook(lambda _module, args, _out: args[0])
                try:
                    turned[name] += float((1 - F.cosine_similarity(whole, _features(model, images))).sum())
                finally:
                    hook.remove()
    return turned


def _features(model: Any, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)


def _chosen(model: nn.Module, frame: Frame, arch: str, args: Mapping[str, Any], wish: Slim, ranks: Ranks) -> Sizes:
    """The sizes asked for; or those that keep the budget and leave out least.

    Raises:
        UsageError: there are none.
    """
    if wish.params is None and wish.macs is None:
        return _asked(frame, wish)

    def cost(size: Sizes) -> tuple[int, int]:
        own = {**args, **frame.arguments(size, ranks.least(frame.depth - size.depth))}
        with torch.device("meta"):
            made = create(arch, pretrained=False, num_classes=int(getattr(model, "num_classes", 0)), **own)
        return work(made, input_size(model, most=None))

    params, macs = cost(Sizes(frame.depth, 1.0, 1.0))
    total = max(sum(ranks.blocks.values()), 1e-30)

    def lost(size: Sizes) -> float:
        gone = sum(ranks.blocks[b] for b in ranks.least(frame.depth - size.depth)) / total
        return gone + ranks.lost("width", size.width) + ranks.lost("hidden", size.hidden)

    for size in sorted(_smaller(frame), key=lost):
        some, work_ = cost(size)
        if some <= (wish.params or 1.0) * params and work_ <= (wish.macs or 1.0) * macs:
            return size
    raise UsageError("no network of this kind is as small", "give a larger budget, or a smaller architecture")


def _asked(frame: Frame, wish: Slim) -> Sizes:
    """The sizes of a wish.

    Raises:
        UsageError: there are no such.
    """
    if wish.hidden is not None and "hidden" not in frame.groups:
        raise UsageError("this network has no hidden units", "leave hidden out, or ask for depth and width")
    least = frame.depth - len(frame.spare)
    if not least <= (wish.depth or frame.depth) <= frame.depth:
        raise UsageError(
            f"of {frame.depth} blocks {max(1, least)} to {frame.depth} can stay, not {wish.depth}",
            "ask for another depth",
        )
    width = max(1, round((wish.width or 1.0) * frame.steps)) / frame.steps if frame.steps else wish.width or 1.0
    return Sizes(wish.depth or frame.depth, width, wish.hidden or 1.0)


def _smaller(frame: Frame) -> Iterator[Sizes]:
    """All sizes that are tried."""
    least = max(1, frame.depth - len(frame.spare), math.ceil(LEAST * frame.depth))
    widths = (
        [k / frame.steps for k in range(math.ceil(LEAST * frame.steps), frame.steps + 1)] if frame.steps else SHARES
    )
    hidden = SHARES if "hidden" in frame.groups else (1.0,)
    return (Sizes(*found) for found in product(range(least, frame.depth + 1), widths, hidden))

"""A smaller network out of a tuned one: what its task depends on least is left out (structured pruning).

    importance of a unit = sum over its entries of  E[g^2] w^2        (how much the loss rises when they are zero, with the Fisher information for the
                                                                       Hessian: Theis et al. 2018, arXiv:1801.05787, eq. 7, less the constant)
    importance of a block = 1 - cosine of the features with the block and without it

Hidden units, attention heads and the channels of the residual stream are put in the order of their importance, which changes nothing, and the first of
each are taken; of the blocks the most important. So the student is a stock network with other arguments, which timm builds.
Of all sizes that keep a budget those are taken that leave out least: the sum over hidden units, heads with channels, and blocks of the share
of their importance that goes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vtzoo import talk
from vtzoo.backbone import create
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.initial import started
from vtzoo.probing import evaluating, input_size
from vtzoo.sensitivity import Batches, scores

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Of the hidden units, of which one is tried after the other."""
LEAST = 0.25
"""The share of blocks and heads that is left at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slim:
    """How small: a budget, or sizes.

    Attributes:
        params: share of the parameters that may be left.
        macs: share of the multiply-adds.
        depth: blocks.
        heads: of each attention; the width of the network goes with them.
        hidden: units of each block's MLP, as a share of what there are.
    """

    params: Share | None = None
    macs: Share | None = None
    depth: Count | None = None
    heads: Count | None = None
    hidden: Share | None = None

    def __post_init__(self) -> None:
        """Refuse no wish at all, and a budget with sizes."""
        budget = [b for b in (self.params, self.macs) if b is not None]
        sizes = [s for s in (self.depth, self.heads, self.hidden) if s is not None]
        if not budget and not sizes:
            raise ValueError("say how small, such as slim[macs=0.5] or slim[depth=8,heads=4]")
        if budget and sizes:
            raise ValueError("give a budget (params, macs) or sizes (depth, heads, hidden)")


@dataclass(frozen=True)
class Member:
    """A tensor's dimension that goes through a group's units: dimension `dim` taken apart into `parts`, of which the `at`-th counts them."""

    name: str
    dim: int
    parts: tuple[int, ...]
    at: int = 0


@dataclass(frozen=True)
class Sizes:
    """Of a transformer: blocks, heads, hidden units."""

    depth: int
    heads: int
    hidden: int


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
        ShapeMismatch: only plain vision transformers are slimmed.
        UsageError: nothing of the kind is as small, or larger sizes were asked for than there are.
    """
    network, images = _plain(model), list(batches)
    ranks, blocks = _ranks(network, images), _without(network, images)
    sizes = _chosen(network, arch, args, wish, ranks, blocks)
    own = _arguments(network, args, sizes)
    made = create(arch, pretrained=False, num_classes=network.num_classes, **own)
    kept = sorted(sorted(range(len(blocks)), key=lambda b: -blocks[b])[: sizes.depth])
    started(made, _arranged(network, ranks, kept), "weight-selection[layers=first,elements=first]", name=f"the {arch}")
    talk.say(f"slimmed to {sizes.depth} of {len(blocks)} blocks, {sizes.heads} heads, {sizes.hidden} hidden units")
    return made.eval(), own


def _plain(model: nn.Module) -> VisionTransformer:
    """The network, if it is one of those that are understood."""
    stock = type(model) is VisionTransformer and all(
        type(b) is Block and type(b.attn) is Attention and type(b.mlp) is Mlp for b in model.blocks
    )
    if not stock or model.attn_pool is not None or any(b.attn.gate is not None for b in model.blocks):  # type: ignore[union-attr] - told above
        raise ShapeMismatch(
            f"slim takes vision transformers apart whose blocks are an attention and an MLP, and this is a {type(model).__name__}",
            "give the student's architecture, and its first weights with --init weight-selection",
        )
    assert isinstance(model, VisionTransformer)
    return model


def _groups(network: VisionTransformer) -> tuple[list[list[Member]], list[list[Member]], list[Member]]:
    """Hidden units of each block, heads of each block, channels of the residual stream."""
    state, width = network.state_dict(), network.embed_dim
    hidden: list[list[Member]] = []
    heads: list[list[Member]] = []
    inner: set[tuple[str, int]] = set()
    for i, block in enumerate(network.blocks):
        at, mlp = f"blocks.{i}.attn.", f"blocks.{i}.mlp."
        attention: Any = block.attn
        row = (attention.num_heads, attention.head_dim)
        heads.append([m for n in ("qkv.weight", "qkv.bias") if (m := Member(at + n, 0, (3, *row), 1)).name in state])
        heads[-1] += [Member(at + "proj.weight", 1, row)]
        heads[-1] += [Member(at + n, 0, row) for n in ("norm.weight", "norm.bias") if at + n in state]
        units: tuple[int, ...] = (int(block.mlp.fc1.out_features),)  # type: ignore[union-attr] - an Mlp
        hidden.append([Member(mlp + n, 0, units) for n in ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias") if mlp + n in state])  # fmt: skip
        hidden[-1] += [Member(mlp + "fc2.weight", 1, units)]
        inner |= {(m.name, m.dim) for m in (*heads[-1], *hidden[-1])}
    stream = [
        Member(n, d, (width,)) for n, t in state.items() for d in _stream_dims(network, n, t) if (n, d) not in inner
    ]
    return hidden, heads, stream


def _stream_dims(network: VisionTransformer, name: str, tensor: Tensor) -> list[int]:
    """Dimensions of a tensor that are channels of the residual stream."""
    if name.startswith("patch_embed.proj"):
        return [0]
    if tensor.ndim == 3 or name.startswith(
        "head."
    ):  # tokens and positions [1, n, width]; the classifier [classes, width]
        return [tensor.ndim - 1] if tensor.ndim > 1 else []
    if ".q_norm." in name or ".k_norm." in name:
        return []
    return [d for d, n in enumerate(tensor.shape) if n == network.embed_dim or (".qkv." in name and d == 1)]


def _along(member: Member, value: Tensor) -> Tensor:
    """A tensor with its group's units in front, [units, rest]."""
    apart = value.unflatten(member.dim, member.parts)
    return apart.movedim(member.dim + member.at, 0).reshape(member.parts[member.at], -1)


@dataclass(frozen=True)
class Ranks:
    """Units in falling order of importance, and how much each of them has, group by group: hidden units, heads, the stream."""

    groups: Sequence[Sequence[Member]]
    orders: Sequence[Tensor]
    weights: Sequence[Tensor]
    hidden: int

    def lost(self, start: int, stop: int, share: float) -> float:
        """Which share of the importance is left out when so many of the most important units stay, mean over groups."""
        gone = [
            1 - float(w[: round(share * len(w))].sum() / w.sum().clamp(min=1e-30)) for w in self.weights[start:stop]
        ]
        return sum(gone) / len(gone)


def _ranks(network: VisionTransformer, batches: Batches) -> Ranks:
    """How important every unit is."""
    weighed = {n: s * network.get_parameter(n).detach().square().to(s) for n, s in scores(network, batches).items()}
    hidden, heads, stream = _groups(network)
    groups, found = [*hidden, *heads, stream], list[Tensor]()
    for group in groups:
        found.append(
            torch.stack([_along(m, weighed[m.name]).sum(1).double() for m in group if m.name in weighed]).sum(0)
        )
    orders = [w.argsort(descending=True, stable=True) for w in found]
    return Ranks(groups, orders, [w[o] for w, o in zip(found, orders, strict=True)], len(hidden))


def _arranged(network: VisionTransformer, ranks: Ranks, kept: Sequence[int]) -> nn.Module:
    """The network with the most important units, and the blocks that are kept, in front."""
    state = dict(network.state_dict())
    for group, order in zip(ranks.groups, ranks.orders, strict=True):
        for m in group:
            apart = state[m.name].unflatten(m.dim, m.parts).index_select(m.dim + m.at, order)
            state[m.name] = apart.flatten(m.dim, m.dim + len(m.parts) - 1)
    order = [*kept, *(i for i in range(len(network.blocks)) if i not in kept)]
    new = {f"blocks.{old}": f"blocks.{i}" for i, old in enumerate(order)}
    heads = {n: ".".join(n.split(".", 2)[:2]) for n in state}
    found = deepcopy(network)
    found.load_state_dict({new.get(h, h) + n.removeprefix(h): state[n] for n, h in heads.items()})
    return found


@torch.no_grad()
def _without(network: VisionTransformer, batches: Batches) -> list[float]:
    """How far the features turn when each block is left out."""
    turned = [0.0] * len(network.blocks)
    with evaluating(network):
        for images, _ in batches:
            whole = _features(network, images)
            for i, block in enumerate(network.blocks):
                hook = block.register_forward_hook(lambda _module, args, _out: args[0])
                try:
                    turned[i] += float((1 - F.cosine_similarity(whole, _features(network, images))).sum())
                finally:
                    hook.remove()
    return turned


def _features(network: VisionTransformer, images: Tensor) -> Tensor:
    return network.forward_head(network.forward_features(images), pre_logits=True).flatten(1)


def _chosen(
    network: VisionTransformer, arch: str, args: Mapping[str, Any], wish: Slim, ranks: Ranks, blocks: Sequence[float]
) -> Sizes:
    """The sizes asked for; or those that keep the budget and leave out least.

    Raises:
        UsageError: there are none.
    """
    whole = _sizes(network)
    if wish.params is None and wish.macs is None:
        hidden = whole.hidden if wish.hidden is None else max(1, round(wish.hidden * whole.hidden))
        own = Sizes(wish.depth or whole.depth, wish.heads or whole.heads, hidden)
        if own.depth > whole.depth or own.heads > whole.heads:
            raise UsageError(
                f"there are {whole.depth} blocks of {whole.heads} heads, and {own.depth} of {own.heads} were asked for",
                "ask for fewer",
            )
        return own
    params, macs = _cost(network, arch, args, whole)
    total, order = max(sum(blocks), 1e-30), sorted(blocks)

    def lost(size: Sizes) -> float:
        width = ranks.lost(ranks.hidden, len(ranks.groups), size.heads / whole.heads)
        return (
            width
            + ranks.lost(0, ranks.hidden, size.hidden / whole.hidden)
            + sum(order[: whole.depth - size.depth]) / total
        )

    for size in sorted(_smaller(whole), key=lost):
        some, work = _cost(network, arch, args, size)
        if some <= (wish.params or 1.0) * params and work <= (wish.macs or 1.0) * macs:
            return size
    raise UsageError("no network of this kind is as small", "give a larger budget, or a smaller architecture")


def _sizes(network: VisionTransformer) -> Sizes:
    first: Any = network.blocks[0]
    return Sizes(len(network.blocks), first.attn.num_heads, first.mlp.fc1.out_features)


def _smaller(whole: Sizes) -> Iterator[Sizes]:
    """All sizes that are tried."""
    least = [max(1, math.ceil(LEAST * n)) for n in (whole.depth, whole.heads)]
    for depth, heads in product(range(least[0], whole.depth + 1), range(least[1], whole.heads + 1)):
        yield from (Sizes(depth, heads, max(1, round(share * whole.hidden))) for share in SHARES)


def _arguments(network: VisionTransformer, args: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """For timm."""
    first: Any = network.blocks[0]
    width = sizes.heads * first.attn.head_dim
    own = {"depth": sizes.depth, "num_heads": sizes.heads, "embed_dim": width, "mlp_ratio": sizes.hidden / width}
    return {**args, **own}


def _cost(network: VisionTransformer, arch: str, args: Mapping[str, Any], sizes: Sizes) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image, of a network of these sizes that is never filled."""
    with torch.device("meta"):
        made = create(arch, pretrained=False, num_classes=network.num_classes, **_arguments(network, args, sizes))
        x = torch.empty(1, *input_size(network, most=None))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        made.eval()(x)
    return sum(p.numel() for p in made.parameters()), counted.get_total_flops() // 2

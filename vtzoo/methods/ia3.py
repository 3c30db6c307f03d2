"""IA3: scale keys, values and the MLP's inner activations by learned vectors (Liu et al. 2022, arXiv:2205.05638, sec. 3.3).

    softmax(q (l_k * k)^T) (l_v * v),   fc2(l_ff * act(fc1(x)))

    outputs   y = l * f(x)      fold:  W' = l[:, None] * W,  b' = l * b
    inputs    y = f(l * x)      fold:  W' = W * l[None, :]

Shapes: l [out] or [in]; [2, out/3] for the keys and values of a fused qkv. All start at 1.
Folds: exactly.  Identity at init: yes.
Parameters: 2 * width + hidden width per transformer block.
Departs from the paper: where a value's bias is a parameter of the attention, not of the layer (BEiT, EVA-02, Swin V2,
DINOv3), it is not scaled (the paper's network has no biases); nor are keys and values that 1x1 convolutions make (CoAtNet). In a gated MLP what enters fc2 is scaled. On a network
without attention and MLPs, of which the paper does not speak, the inputs of the blocks' dense convolutions are, as
PEFT can be told to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Before

GROUP = "parameter/weight"
PAPER = "arXiv:2205.05638"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 0.0}, "maps": {"lr": 3e-3, "weight_decay": 0.0}}
SPLIT = {"k", "v", "kv", "k_proj", "v_proj", "to_k", "to_v", "key", "value"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        outputs: layers whose outputs are scaled, by role, name or glob; auto is the keys and values of the blocks (of a fused
            qkv that part alone).
        inputs: layers whose inputs are scaled; auto is the last layer of each block's MLP, or the blocks' dense convolutions where
            there is neither MLP nor attention.
    """

    outputs: tuple[str, ...] = ("auto",)
    inputs: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Keys, values and the layers after an activation.

    Raises:
        UsageError: a layer is named twice, a scale would be undone, or a fused qkv is in an unknown order.
    """
    found: dict[str, Site] = {}
    for side, targets in (("out", config.outputs), ("in", config.inputs)):
        for target in targets:
            for site in _auto(anatomy, side) if target == "auto" else anatomy.select([target]):
                if found.get(site.name, site).facts.get("side", side) != side:
                    raise UsageError(f"{site.name} stands in outputs and in inputs", "name it once")
                _scalable(site, side)
                found.setdefault(site.name, replace(site, facts={**site.facts, "side": side}))
    if not found:
        raise UsageError("ia3 has nothing to scale", "name layers in outputs=… or inputs=…")
    return list(found.values())


def _auto(anatomy: Anatomy, side: str) -> list[Site]:
    """What the paper scales on this side."""
    dense = anatomy.select(["auto"])
    fused = [s for s in dense if "fused" in s.facts]
    apart = [s for s in dense if SPLIT & set(s.name.split(".")[-2:])]
    if side == "out":
        return apart + [replace(s, facts={**s.facts, "heads": _order(anatomy, s)}) for s in fused]
    mlps = [s for s in dense if s.last == "fc2" and "mlp" in s.name.split(".")[-2]]
    return mlps if mlps or fused else [s for s in dense if s not in apart]


def _order(anatomy: Anatomy, site: Site) -> int:
    """1 where a fused qkv's outputs are all q, all k, all v; the number of heads where they are q, k and v of each head in turn."""
    attention = anatomy.modules[site.name.rpartition(".")[0]]
    for heads in (1, getattr(attention, "num_heads", 1)):
        if anatomy.value_last(site.name, heads):
            return heads
    raise UsageError(
        f"the outputs of {site.name} are not q, k and v in this order, neither in all nor by head",
        "ia3[outputs=qkv] scales all of them",
    )


def _scalable(site: Site, side: str) -> None:
    """Refuse a convolution that standardises its weight where that undoes the scale."""
    if "standardised" in site.facts and (side == "out" or site.shape[1] == 1):
        raise UsageError(
            f"{site.name} standardises its weight, which undoes a scale", "leave it out; ssf scales its gain"
        )


class Graft(graft.Graft):
    """The vector of one layer."""

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - every graft takes both
        super().__init__()
        self.calls = site.kind == "linear" and site.called
        self.inner, self.heads = site.facts["side"] == "in", site.facts.get("heads")
        self.groups = int(site.facts.get("groups", 1))
        self.edits = ("weight", "bias") if site.bias and not self.inner else ("weight",)
        out, fan_in = site.shape[:2]
        shape = (2, out // 3) if self.heads else (fan_in * self.groups,) if self.inner else (out,)
        self.l, self.undecayed = nn.Parameter(torch.ones(*shape)), ("l",)

    def enter(self, x: Tensor) -> Tensor:
        """Scale the inputs, [..., in]."""
        return x * self.l if self.inner else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Scale the outputs, [..., out]."""
        return y if self.inner else y * self._rows()

    def read(self, name: str, before: Before) -> Tensor:
        """Columns of the weight, or rows of weight and bias, scaled."""
        value = before[name]
        if self.inner:  # each group of a convolution has inputs of its own
            groups = value.reshape(self.groups, -1, *value.shape[1:])
            return (groups * self.l.reshape(self.groups, 1, -1, *[1] * (value.ndim - 2))).reshape(value.shape)
        return value * self._rows().reshape(-1, *[1] * (value.ndim - 1))

    def _rows(self) -> Tensor:
        """A factor for each output; 1 for the queries."""
        if not self.heads:
            return self.l
        qkv = torch.cat([torch.ones_like(self.l[:1]), self.l])
        return qkv.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten()

"""Conv-Adapter: a reduced depthwise convolution and a pointwise one (Chen et al. 2022, arXiv:2208.07463).

    A(x) = alpha * (U act(K * x + k) + u)        parallel: y = f(x) + A(x)        sequential: y = f(x) + A(f(x))

f is a block's convolution (conv), or the whole block (residual); K has one output for each `reduce` inputs.
Shapes: K [width, in/width, kh, kw] with width = in/reduce groups, k [width], U [out, width], u [out], alpha [out].
Folds: no: an activation stands between its convolutions.  Identity at init: yes (U and u zero, K Kaiming-uniform, alpha 1).
Parameters: in * kh * kw + width + out * width + 2 * out per site.
Departs from the paper: U starts at zero (the authors' code draws it as the backbone's convolutions). A block has one
adapter, at its first convolution wider than 1x1, with that one's kernel, stride and padding; it is added before the norm,
where the code has it for ResNet's basic blocks and ConvNeXt (in bottlenecks after norm and activation). A block of
windowed attention (Swin) has it beside the attention, from the norm on, as in the code; other blocks without such a
convolution (PoolFormer's) around the whole block. Where `reduce` does not divide in, width is its largest divisor below.
Downsampling layers between stages have none (the code's ConvNeXt does).
The activation is a knob; the code takes the backbone's own. Relied on: the authors' code (it has conv-parallel alone).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import ACTIVATIONS, at
from vtzoo.methods._branches import AXES, beside_attention
from vtzoo.methods._maps import Mapped, Notes, lay

GROUP = "adapter/parallel"
PAPER = "arXiv:2208.07463"
RECIPE = {"tokens": {"lr": 1e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}
Shared = Notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        at: which part of a block is adapted.
        form: from the part's input to its output, or from its output on.
        reduce: inputs for each hidden channel.
        kernel: side of K where the part is not a convolution; odd.
        act: the activation.
    """

    at: Literal["conv", "residual"] = "conv"
    form: Literal["parallel", "sequential"] = "parallel"
    reduce: Annotated[int, Field(ge=1)] = 8
    kernel: Annotated[int, Field(ge=1)] = 3
    act: Literal["gelu", "relu", "silu"] = "relu"

    def __post_init__(self) -> None:
        """Refuse a kernel without a centre."""
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} is even and has no centre")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """In each block that has a map: its convolution, its attention's branch, or itself."""
    wanted: list[Site] = []
    others: list[Site] = []
    for block in anatomy.blocks:
        wide = next((c for c in anatomy.convs if _adapted(block, c)), None) if config.at == "conv" else None
        if wide is not None:
            wanted.append(_beside(anatomy, wide))
        elif len(anatomy.seen[block.name].x) == len(anatomy.seen[block.name].y) == AXES:
            others.append(block)
    beside = beside_attention(anatomy, others if config.at == "conv" else [])
    wanted += [beside[b.name][0] if b.name in beside else at(anatomy, b.name) for b in others]
    if not wanted:
        raise UsageError(
            f"the blocks of {type(anatomy.model).__name__} carry sequences of tokens, not maps, and have no convolutions",
            "use convpass or mona instead",
        )
    return lay(anatomy, wanted, [keeper for _, keeper in beside.values()])


def _adapted(block: Site, conv: Site) -> bool:
    """Whether a convolution is one of a block's own, wider than 1x1, and not one that makes an attention's keys fewer."""
    name = conv.name
    return name.startswith(f"{block.name}.") and conv.called and max(conv.shape[2:]) > 1 and ".attn." not in name


def _beside(anatomy: Anatomy, conv: Site) -> Site:
    """A convolution as a site that knows how to run another one like it."""
    module: Any = anatomy.modules[conv.name]
    same = type(module).__name__.endswith("Same") and getattr(module, "same_pad", True)
    how = {"stride": list(module.stride), "padding": "same" if same else conv.facts["padding"]}
    return anatomy.module(conv.name, axis=1, kernel=list(conv.shape[2:]), dilation=list(module.dilation), **how)


class Graft(Mapped):
    """The two convolutions beside or behind a part of a block."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        if self.bare:
            return
        self.nonlinear, self.sequential = ACTIVATIONS[config.act], config.form == "sequential"
        facts, out = site.facts, self.channels
        fan_in = out if self.sequential else int(facts["x"][0 if self.axis == 1 else -1])
        kernel: Any = facts.get("kernel", [config.kernel] * 2)
        self.stride, self.padding, self.dilation = _geometry(site, self.axis, kernel)
        if self.sequential:  # the part's output keeps its size
            kernel = [k // 2 * 2 + 1 for k in kernel]
            self.stride, self.padding, self.dilation = [1, 1], [k // 2 for k in kernel], [1, 1]
        self.width = max(w for w in range(1, max(1, fan_in // config.reduce) + 1) if fan_in % w == 0)
        self.kernel = nn.Parameter(torch.empty(self.width, fan_in // self.width, *kernel))
        self.kernel_bias = nn.Parameter(torch.zeros(self.width))
        self.up, self.up_bias = nn.Parameter(torch.zeros(out, self.width)), nn.Parameter(torch.zeros(out))
        self.alpha = nn.Parameter(torch.ones(out))
        nn.init.kaiming_uniform_(self.kernel, a=math.sqrt(5))

    def act(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter of the input, or of the output."""
        given = self.given(x, y)
        return y if given is None else y + self._adapter(y if self.sequential else given)

    def _adapter(self, x: Tensor) -> Tensor:
        x = self._padded(x.movedim(self.axis, 1))
        padding = [0, 0] if self.padding == "same" else self.padding
        hidden = F.conv2d(x, self.kernel, self.kernel_bias, self.stride, padding, self.dilation, self.width)
        hidden = F.linear(self.nonlinear(hidden).movedim(1, -1), self.up, self.up_bias)
        return (self.alpha * hidden).movedim(-1, self.axis)

    def _padded(self, x: Tensor) -> Tensor:
        """As TensorFlow pads, where the convolution beside it does."""
        if self.padding != "same":
            return x
        sides: list[int] = []
        for size, k, s, d in zip(x.shape[2:], self.kernel.shape[2:], self.stride, self.dilation, strict=True):
            lack = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            sides = [lack // 2, lack - lack // 2, *sides]
        return F.pad(x, sides)


def _geometry(site: Site, axis: int, kernel: Sequence[int]) -> tuple[Any, Any, Any]:
    """Stride, padding and dilation that take a part's input to the size of its output."""
    facts = site.facts
    if "stride" in facts:
        return facts["stride"], facts["padding"], facts["dilation"]
    before, after = (v[1:] if axis == 1 else v[:-1] for v in (facts["x"], site.shape))
    return [round(a / b) for a, b in zip(before, after, strict=True)], [k // 2 for k in kernel], [1, 1]

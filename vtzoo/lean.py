"""A frozen linear whose weight a product of two thin matrices is added to, trained for little more than the frozen one costs.

    y = x (W + L R)^T + b           dL = dy^T (x R^T),   dR = (dy L)^T x,   dx = dy (W + L R),   db = dy^T 1

In float32 W + L R is made once for each pass, which takes no time beside the two passes over all activations that a branch
of its own needs; with fewer bits the sum would round the product away, and the branch stays, added in place. Of the input
nothing is saved that another node saves anyway: what came out of a norm, an activation or a gate is computed again. The
same holds for a thin matrix by itself (`thin`), the first one of a bottleneck.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WIDE = (torch.float32, torch.float64)
_COUNTED = ContextVar("counted", default=False)
_OFF = ContextVar("off", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x (weight + left right)^T + bias; weight gets no gradient.

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        bias: [out], if there is one; it may be trained.
        left: [out, r].
        right: [r, in].

    Returns:
        [..., out].
    """
    again, kept = _recipe(x)
    return _Linear.apply(x, weight, bias, left, right, again, *kept)


def thin(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias for a trained weight [r, in] with few rows."""
    if not applies():
        return F.linear(x, weight, bias)
    again, kept = _recipe(x)
    return _Thin.apply(x, weight, bias, again, *kept)


def applies(*parameters: Tensor | None) -> bool:
    """Whether the lean way can be gone: own parameters frozen, a gradient wanted, and `untouched`."""
    frozen = not any(p is not None and p.requires_grad for p in parameters)
    return frozen and torch.is_grad_enabled() and untouched()


def untouched() -> bool:
    """Whether nobody transforms code, differentiates forward, or has switched lean ways off."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _OFF.get()
    )


def off() -> AbstractContextManager[None]:
    """Inside, layers, and attention in bf16, go the plain way, for what the lean one can't do: gradients of gradients, forward-mode, batched gradients."""
    return _on(_OFF)


class _Linear(torch.autograd.Function):
    """See the module's docstring; `again(*kept)` is the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor,
        again: Callable[..., Tensor], *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.again, ctx.summed = again, kind in WIDE
        ctx.save_for_backward(weight, left, right, *kept)
        if ctx.summed:
            return F.linear(x, torch.addmm(weight, left, right), bias)
        y = F.linear(x, weight, bias)
        hidden = F.linear(x, right).flatten(0, -2)
        y.flatten(0, -2).addmm_(hidden, left.to(y.dtype).mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] - torch names it otherwise
        weight, left, right, *kept = ctx.saved_tensors
        (grad,) = grads
        dy = grad.flatten(0, -2)
        x = ctx.again(*kept).flatten(0, -2).to(dy.dtype)
        low, high = left.to(dy.dtype), right.to(dy.dtype)
        inner = low.mT @ dy.mT  # thin matrices lie on their sides: a product with a tall one is several times slower
        dleft = ((high @ x.mT) @ dy).mT.to(left.dtype)
        dright = (inner @ x).to(right.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            del x
            full = torch.addmm(weight, left, right) if ctx.summed else weight.to(dy.dtype)
            dx = dy @ full
            dx = (dx if ctx.summed else dx.addmm_(inner.mT, high)).view(*grad.shape[:-1], weight.shape[1])
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, dleft, dright, None, *[None] * len(kept)


class _Thin(torch.autograd.Function):
    """See `thin`; `again(*kept)` is the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Callable[..., Tensor], *kept: Tensor
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] - torch names it otherwise
        weight, *kept = ctx.saved_tensors
        (grad,) = grads
        dy = grad.flatten(0, -2)
        x = ctx.again(*kept).flatten(0, -2).to(dy.dtype)
        dweight = (dy.mT.contiguous() @ x).to(weight.dtype)  # on its side, as above
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        dx = (dy @ weight.to(dy.dtype)).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, dweight, dbias, None, *[None] * len(kept)


def _recipe(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """What gives x again, and of which tensors: those that the node which made it saves for itself, else x."""
    node: Any = x.grad_fn
    if node is None or x._version or _watched():  # changed in place since, perhaps where autograd did not look
        return _same, (x,)
    match node.name():
        case "GeluBackward0":
            how = node._saved_approximate
            return (lambda z: F.gelu(z, approximate=how)), (node._saved_self,)
        case "SiluBackward0":
            return F.silu, (node._saved_self,)
        case "NativeLayerNormBackward0":
            moments = node._saved_result1, node._saved_result2
            return _normed, (node._saved_input, *moments, node._saved_weight, node._saved_bias)
        case "MulBackward0" if node._saved_self is not None and node._saved_other is not None:
            return torch.mul, (node._saved_self, node._saved_other)
        case _:
            return _same, (x,)


def counting() -> AbstractContextManager[None]:
    """Inside, hooks on what is saved are somebody's who counts it, and gives each tensor as often as it is asked for."""
    return _on(_COUNTED)


@contextmanager
def _on(switch: ContextVar[bool]) -> Generator[None]:
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def _watched() -> bool:
    """Whether somebody else keeps what is saved, as activation checkpointing does, and wants each tensor asked for once."""
    return not _COUNTED.get() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined] - in no stub


def _same(x: Tensor) -> Tensor:
    return x


def _normed(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = (x - mean).mul_(rstd)
    if weight is None or bias is None:
        return y if weight is None else y.mul_(weight)
    return torch.addcmul(bias, y, weight, out=y)  # as the norm itself rounds

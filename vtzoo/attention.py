"""Attention while training on a CPU in bf16: plain matrix products instead of torch's fused kernel.

The fused kernel keeps no [tokens, tokens] matrix, but its bf16 passes are slow (benchmarks/bench_attention.py). Here the matrix
of a few heads at a time is made, used and forgotten, and made again for the backward pass:

    P = softmax(s Q K^T),  O = P V        dV = P^T dO,  dS = P * (dO V^T - rowsum(P * dO V^T)),  dQ = s dS K,  dK = s dS^T Q

The products have bf16's 8 bits, which the fused kernel's scores do not; so keys are centred, K - mean(K). That takes a number off each
row of the scores, which changes neither P nor gradients, and is most of what would be rounded in networks whose keys have an offset.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vtzoo import lean

LARGEST = 256**2
"""Queries times keys, above which a matrix that is kept costs more memory than the time is worth."""
AT_ONCE = 2**22
"""Numbers of the matrix that are made at once; where one head has more, the fused kernel runs."""


class PlainAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` of bf16 sequences on a CPU is computed step by step."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the one function where it pays."""
        given = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) >= 3:
            short, forgets = _pays(*args, **given)
            if forgets:
                return _forgetful(*args, **given)
            if short:
                return _attention(*args, **given)
        return function(*args, **given)


def _kind(tensor: Tensor) -> torch.dtype:
    """The type that a product with it is computed in."""
    cast = torch.is_autocast_enabled("cpu") and tensor.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if cast else tensor.dtype


def _pays(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, attn_mask: Tensor | None = None, **kwargs: Any
) -> tuple[bool, bool]:  # fmt: skip
    """Whether the matrix may be kept, and whether it may be made twice instead."""
    cheap = all(t.device.type == "cpu" and _kind(t) == torch.bfloat16 for t in (query, key, value))
    if not cheap or rest or any(kwargs.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
        return False, False
    numbers = query.shape[-2] * key.shape[-2]
    alike = query.shape[:-2] == key.shape[:-2] and key.shape[:-1] == value.shape[:-1]
    bare = mask is None and attn_mask is None and kwargs.get("scale") != 0
    return 0 < numbers <= LARGEST, bare and alike and 0 < numbers <= AT_ONCE and lean.untouched()


def _centred(key: Tensor) -> Tensor:
    """Keys [..., m, d] less their mean over m; see the module's docstring."""
    return key - key.mean(-2, keepdim=True)  # rounded as it is: any vector may be taken off


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None, **_: Any
) -> Tensor:
    """softmax(q k^T scale + mask) v; [..., n, d], [..., m, d], [..., m, e] -> [..., n, e]."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ _centred(key).transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        added = attn_mask.dtype != torch.bool
        hidden = attn_mask == -torch.inf if added else ~attn_mask
        scores = scores + attn_mask if added else scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).masked_fill(
            hidden, 0
        )  # zeros, as with the fused kernel, where nothing may be seen
    return weights.to(value.dtype) @ value


def _forgetful(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    """softmax(q k^T scale) v, of which the backward pass keeps q, k and v alone."""
    given = (t.to(torch.bfloat16) for t in (query, key, value))
    return _Attention.apply(*given, query.shape[-1] ** -0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        out = value.new_empty(*query.shape[:-1], value.shape[-1])
        for q, k, v, o in _few(query, key, value, out):
            torch.bmm(_weights(q, _centred(k), scale), v, out=o)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] - torch names it otherwise
        saved = ctx.saved_tensors
        made = tuple(torch.empty(t.shape, dtype=t.dtype) for t in saved)
        for q, key, v, do, dq, dk, dv in _few(*saved, *grads, *made):
            weights = _weights(q, k := _centred(key), ctx.scale)
            torch.bmm(weights.mT, do, out=dv)
            dscores = torch.ops.aten._softmax_backward_data(do @ v.mT, weights, -1, weights.dtype)  # noqa: SLF001 - an operator's name
            torch.bmm(dscores, k, out=dq).mul_(ctx.scale)
            torch.bmm(dscores.mT, q, out=dk).mul_(ctx.scale)
        return *made, None


def _few(query: Tensor, key: Tensor, *others: Tensor) -> Generator[tuple[Tensor, ...]]:
    """Some heads after each other, [heads, n, d], of tensors [..., n, d]; what is contiguous is written through."""
    count = max(1, AT_ONCE // (query.shape[-2] * key.shape[-2]))
    flat = (t.reshape(-1, *t.shape[-2:]).split(count) for t in (query, key, *others))
    yield from zip(*flat, strict=True)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale), [heads, n, m]."""
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)

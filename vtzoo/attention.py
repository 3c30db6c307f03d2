"""Attention while training on a CPU in bf16: plain matrix products instead of torch's fused kernel.

The fused kernel keeps no [tokens, tokens] matrix, but its bf16 passes are slow: forward and backward take 4.6 times as
long as the plain products over 65 tokens and 2.4 times over 197 (benchmarks/bench_attention.py, on a core without AMX).
Over few tokens the matrix costs little memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGEST = 256**2
"""Queries times keys, above which the matrix costs more memory than the time is worth."""


class PlainAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` of short bf16 sequences on a CPU is computed step by step."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the one function where it pays."""
        given = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) >= 3 and _pays(*args, **given):
            return _attention(*args, **given)
        return function(*args, **given)


def _pays(query: Tensor, key: Tensor, _value: Tensor, *rest: Any, **kwargs: Any) -> bool:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    cheap = query.device.type == "cpu" and dtype == torch.bfloat16
    plain = len(rest) < 2 and not any(kwargs.get(option) for option in ("dropout_p", "is_causal", "enable_gqa"))
    return cheap and plain and query.shape[-2] * key.shape[-2] <= LARGEST


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None, **_: Any
) -> Tensor:
    """softmax(q k^T scale + mask) v; [..., n, d], [..., m, d], [..., m, e] -> [..., n, e]."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
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

"""Attention in bf16 on one core: torch's fused kernel beside the plain products that training uses instead.

    python benchmarks/bench_attention.py

Forward and backward of 6 heads of 64, the fastest of seven, with as many images as make about 3,000 tokens. The errors are those of
the three gradients, relative to float64's, where keys have an offset that makes scores ten times as large as they differ. Writes
results/attention.json.
"""

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from _results import keep
from torch.nn import functional as F

from vtzoo.attention import PlainAttention

HEAD = ("tokens", "images", "fused, ms", "plain, ms", "fused / plain", "fused, error", "plain, error")
TOKENS = (33, 65, 197, 257, 1370)


def milliseconds(tokens: int, images: int, how: AbstractContextManager[object]) -> float:
    """The fastest of seven forward and backward passes."""
    inputs = [torch.randn(images, 6, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    times: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        with how:
            out = F.scaled_dot_product_attention(*inputs)
        out.backward(out.detach())
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def error(tokens: int, how: AbstractContextManager[object]) -> float:
    """Of one image's gradients."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(1, 6, tokens, 64, generator=generator) for _ in range(3))
    given = [t.bfloat16().requires_grad_() for t in (query + 2, key + 5, value)]
    wide = [t.detach().double().requires_grad_() for t in given]
    with how:
        out = F.scaled_dot_product_attention(*given)
    into = torch.randn(out.shape, generator=generator).bfloat16()
    found = torch.autograd.grad(out, given, into)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, into.double())
    wrong, all_ = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, exact))
    return ((wrong - all_).norm() / all_.norm()).item()


def main() -> None:
    """Run and keep."""
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    for tokens in TOKENS:
        images = max(1, 3000 // tokens)
        fused, plain = (milliseconds(tokens, images, how) for how in (nullcontext(), PlainAttention()))
        errors = [f"{error(tokens, how):.4f}" for how in (nullcontext(), PlainAttention())]
        rows.append((str(tokens), str(images), f"{fused:.1f}", f"{plain:.1f}", f"{fused / plain:.1f}", *errors))
        print("  ".join(rows[-1]), flush=True)
    keep(__doc__ or "", "bf16, one core", HEAD, rows, rows)


if __name__ == "__main__":
    main()

"""One image through a model: of which size, in evaluation mode, with everything as it was afterwards."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def input_size(model: nn.Module, most: int | None = 96) -> tuple[int, int, int]:
    """The size in pixels [channels, height, width] that a probe should have; `most` caps it where any size will do."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = tuple(config.get("input_size") or (3, 224, 224))
    channels = _channels(model, config.get("first_conv"), channels)
    sized = (getattr(m, "img_size", None) for m in model.modules())  # a patch embedding's, often
    fixed: Any = next((s for s in sized if s is not None), None)
    grid: Any = getattr(model, "tokens_spatial_shape", None)  # Hiera's
    if fixed is not None:
        height, width = (fixed, fixed) if isinstance(fixed, int) else tuple(fixed)
    elif grid is not None:
        height, width = (n * stride for n, stride in zip(grid, model.patch_stride, strict=True))  # type: ignore[arg-type] - two numbers
    elif most and not config.get("fixed_input_size"):
        height, width = min(height, most), min(width, most)
    return channels, height, width


def _channels(model: nn.Module, first: Any, usual: int) -> int:
    """How many channels the convolution takes that sees the pixels; `first` is what timm calls it, and empty where it is none."""
    convs = {n: m.in_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    named = [first] if isinstance(first, str) else first
    if named is None:
        return next(iter(convs.values()), usual)
    return next((convs[n] for n in named if n in convs), usual)


@torch.no_grad()
def probe(model: nn.Module, size: tuple[int, int, int] | None = None) -> Tensor:
    """One forward of one random image in eval mode; the model's modes stay as they were."""
    like = next(model.parameters())

    def run(size: tuple[int, int, int]) -> Tensor:
        x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
        return model(x)

    small, own = input_size(model), input_size(model, most=None)
    with evaluating(model):
        if size is not None or small == own:
            return run(size or own)
        try:
            return run(small)
        except (AssertionError, RuntimeError, ValueError):  # some take their own size, or multiples of a larger one
            return run(own)


def work(model: nn.Module, size: tuple[int, int, int]) -> tuple[int, int]:
    """A network's parameters, and the multiply-adds of one image of this size by torch's own count.

    Convolutions and matrix products are counted, attention's among them; norms, activations and additions are not.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    like = next(model.parameters())
    x = torch.zeros(1, *size, device=like.device, dtype=like.dtype)
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(x)  # a fused attention would not be counted on a processor
    return sum(p.numel() for p in model.parameters()), counted.get_total_flops() // 2


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put a model in eval mode, and afterwards every module's mode back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        forget(model)


def forget(model: nn.Module) -> None:
    """Drop what some attentions (LeViT, TinyViT) compute from their biases in eval mode and keep: it may be of others."""
    for module in model.modules():
        if kept := module.__dict__.get("attention_bias_cache"):
            kept.clear()

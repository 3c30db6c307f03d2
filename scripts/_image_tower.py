"""The image tower: EfficientNet-Lite0's early stages as they are, its late ones and a projection aligned with words."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, log_softmax, normalize

LOG = logging.getLogger("make_clip")
SIDE, KEPT_SIDE, FROZEN = 128, 144, 5  # pixels in, pixels kept to crop from, stages that are not trained


def early(trunk: nn.Module, x: Tensor) -> Tensor:
    """The stem and the first stages."""
    net: Any = trunk
    return net.blocks[:FROZEN](net.bn1(net.conv_stem(x)))


def late(trunk: nn.Module, x: Tensor) -> Tensor:
    """What `early` gives to pooled features [n, 1280]."""
    net: Any = trunk
    return net.forward_head(net.bn2(net.conv_head(net.blocks[FROZEN:](x))), pre_logits=True)


@torch.inference_mode()
def cached(trunk: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """`early` of uint8 images [n, 3, 128, 128], as bfloat16."""
    rows: list[Tensor] = []
    for part in images.split(batch_size):
        x = (part.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(early(trunk, x).bfloat16())
    return torch.cat(rows)


def whole(images: Tensor) -> Tensor:
    """uint8 images at the tower's size."""
    return interpolate(images.float(), SIDE, mode="bilinear", antialias=True).clamp(0, 255).byte()


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image's random square of half its area or more, half of them mirrored, at the tower's size."""
    out: list[Tensor] = []
    full = images.shape[-1]
    for image in images:
        side = int(torch.randint(round(0.7 * full), full + 1, (), generator=generator))
        top, left = torch.randint(0, full + 1 - side, (2,), generator=generator).tolist()
        part = image[:, top : top + side, left : left + side]
        out.append(whole(part.flip(2) if torch.rand((), generator=generator) < 0.5 else part[None].squeeze(0))[None])
    return torch.cat(out)


def least_squares(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight [k, d] and bias [k] that bring features x [n, d] nearest to y [n, k], minus its mean.

    (X'X + ridge * mean(diag X'X) * I) W' = X'Y with centred X and Y.
    """
    mean, x = x.mean(0), x - x.mean(0)
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0))).T
    return weight, -weight @ mean

"""Networks in two sizes, and what tests of first weights ask of them."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.models._efficientnet_builder import round_channels
from torch import Tensor, nn

from vtzoo.errors import ShapeMismatch, VtzooError
from vtzoo.initial import started

VIT = {"embed_dim": 64, "num_heads": 4}
SWIN = {"embed_dim": 32, "num_heads": (2, 4)}
TWICE = {"round_chs_fn": partial(round_channels, multiplier=2.0)}
DIMS = {"dims": (16, 32, 48, 64)}
WIDER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["vit", "vit-bare", "vit-gap", "vit-reg", "deit3", "deit-dist", "clip", "siglip", "beit", "eva02", "dinov3", "cait", "hybrid"], VIT),
    "swin": SWIN, "swinv2": SWIN, "convnext": DIMS, "convnextv2": DIMS, "mixer": {"embed_dim": 64},
    "resnet": {"channels": (16, 32, 32, 48), "stem_width": 16}, "hiera": {"embed_dim": 32, "num_heads": 2},
    "pvt": {"embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 4, 4)}, "efficientnet": TWICE, "mobilenetv4": TWICE,
}  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest output."""
    return ((a - b).abs().max() / a.abs().max()).item()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {n: t.clone() for n, t in model.state_dict().items()}


def refused(
    student: nn.Module, source: nn.Module, spec: str, said: str, kind: type[VtzooError] = ShapeMismatch
) -> VtzooError:
    """The refusal, which leaves the student as it was."""
    before = bits(student)
    with pytest.raises(kind, match=said) as caught:
        started(student, source, spec)
    after = student.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert caught.value.hint
    return caught.value

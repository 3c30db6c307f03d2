"""A small random dual encoder that was told three class names, for tests of what is done to its classifier."""

from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor

import vtzoo.dual  # noqa: F401 - registers the architecture
from tests import families

WORDS = ("cat", "traffic light", "emu")
LABELS = torch.tensor([0, 2, 1, 1, 0])
TEXT = {"width": 32, "heads": 4, "layers": 2, "context_length": 24, "vocab_size": 49408}
TINY = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
VIT: dict[str, Any] = {
    "trunk": "vit_base_patch16_clip_224", "trunk_args": {**TINY, "patch_size": 8}, "embed_dim": 24, "text": TEXT,
}  # fmt: skip


TRUNKS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224": {**TINY, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 2,
    },
}
"""Arguments of other trunks, where the defaults are none."""


@cache
def _state(trunk: str) -> dict[str, Tensor]:
    model = timm.create_model("clip", **_args(trunk)).double()
    families.randomise(model, images())
    with torch.no_grad():
        model.get_parameter("logit_scale").fill_(3.0)
    return model.state_dict()


def _args(trunk: str) -> dict[str, Any]:
    return VIT if trunk == VIT["trunk"] else {**VIT, "trunk": trunk, "trunk_args": TRUNKS.get(trunk, {})}


def spoken(trunk: str = VIT["trunk"]) -> Any:
    """A fresh one in float64, frozen, in eval mode."""
    model = timm.create_model("clip", **_args(trunk)).double().eval().requires_grad_(False)
    model.load_state_dict(_state(trunk))
    return model.speak(WORDS)


def images(count: int = len(LABELS)) -> Tensor:
    """[count, 3, 32, 32]."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

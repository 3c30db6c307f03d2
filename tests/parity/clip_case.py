"""One small random open_clip model in float64, with images, class names and its tokenizer, for the language methods' parity."""

from functools import cache

import open_clip
import torch
from torch import Tensor

NAMES = ("cat", "axolotl", "traffic light", "a very old teapot")
TEMPLATE = "a photo of a {}."
LENGTH, WIDTH, EYE, JOINT = 20, 32, 48, 24
"""Tokens of a text, widths of the text tower, the image tower and the joint space."""
EYE_CONFIG = {"image_size": 32, "patch_size": 16, "width": EYE, "layers": 3, "head_width": 8}
TEXT_CONFIG = {"context_length": LENGTH, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 4}
CLIP = {"embed_dim": JOINT, "vision_cfg": EYE_CONFIG, "text_cfg": TEXT_CONFIG}
CONFIGS = {
    "clip": CLIP,
    "custom": {**CLIP, "custom_text": True},  # the text tower has a module of its own
    "siglip": {
        **CLIP,
        "custom_text": True,
        "text_cfg": {**TEXT_CONFIG, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "init_logit_bias": -10,
    },
}
say = open_clip.SimpleTokenizer(context_length=LENGTH)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64, the same for the same arguments."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def made(kind: str = "clip") -> open_clip.CLIP:
    """A frozen model whose every parameter is drawn, norms and biases as well; its classes differ clearly."""
    config = dict(CONFIGS[kind])
    build = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(**config).double().eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if "token_embedding" not in name and name != "logit_scale":
                value.add_(torch.randn_like(value), alpha=0.2)
    return model


def images(count: int = 3, seed: int = 1) -> Tensor:
    """[count, 3, 32, 32]."""
    return random(count, 3, 32, 32, seed=seed)

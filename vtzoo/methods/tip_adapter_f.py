"""Tip-Adapter-F: the training images' features as keys, which are then trained (Zhang et al. 2022, arXiv:2207.09519, sec. 3.2).

    logits = W f + b + alpha exp(-beta (1 - f K')) V,   f normalised, K [images, features] starts as the training images' own f

W, b and V are not trained; where they are from, see tip-adapter.

Shapes: K [images, features], W [classes, features], b [classes].
Folds: no: the keys are compared one by one (a headless fold leaves it out).
Identity at init: yes (of the features; the logits are tip-adapter's).
Parameters: images * features, in the head.
Departs from the paper: an image's key is that of one view, not the mean of ten augmented ones; the last epoch is kept, where the authors' code
(github.com/gaopengcuhk/Tip-Adapter) chooses it on the test images; alpha and beta are searched only with search=true.
"""

from dataclasses import dataclass

from torch import nn

from vtzoo.graft import Graft
from vtzoo.methods._cache import Cache, Knobs, prepare, tune
from vtzoo.methods._features import sites
from vtzoo.text_head import TextHead

GROUP = "adapter/sequential"
PAPER = "arXiv:2207.09519"
RECIPE = {"tokens": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-2}, "maps": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-2}}  # fmt: skip
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "prepare", "sites", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Knobs):
    """As in `Knobs`."""


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The classifier with room for keys that are trained beside it."""
    return Cache(old, config, trained=True)

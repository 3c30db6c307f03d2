"""Tip-Adapter: keep the training images, and ask which of them an image resembles; nothing is trained (Zhang et al. 2022, arXiv:2207.09519, eq. 3-6).

    logits = W f + b + alpha exp(-beta (1 - f K')) V,   f normalised, K [images, features] the training images' own f, V their labels

W and b are what a dual encoder's text tower makes of the classes' names. On any other backbone they are made of the same features: head=prototype
takes each class's mean (W = scale * normalise(mean), b = 0), head=linear ridge regression in closed form.

Shapes: K [images, features], W [classes, features], b [classes].
Folds: no: the images are compared one by one (a headless fold leaves it out).
Identity at init: yes (of the features; the logits have the images' word at once).
Parameters: none is trained; images * (features + 1) numbers are kept, in the head.
Departs from the paper: an image's key is that of one view, not the mean of ten augmented ones; alpha and beta are searched on validation images only
with search=true, up to 3 and 7; in a stack K are features of the network before anything is trained.
"""

from dataclasses import dataclass

from torch import nn

from vtzoo.graft import Graft
from vtzoo.methods._cache import Cache, Knobs, prepare, tune
from vtzoo.methods._features import sites
from vtzoo.text_head import TextHead

GROUP = "adapter/sequential"
PAPER = "arXiv:2207.09519"
__all__ = ["GROUP", "PAPER", "Config", "Graft", "head", "prepare", "sites", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Knobs):
    """As in `Knobs`."""


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The classifier with room for the images beside it."""
    return Cache(old, config)

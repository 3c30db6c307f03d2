"""CoOp: learn the words around a class name, as vectors (Zhou et al. 2022, arXiv:2109.01134, eq. 3).

    T_c = text([v_1 ... v_M, name_c])      logits = exp(s) f T',   f, T normalised; v shared by all classes, or of each class its own

Shapes: v [count, width of the text tower], or [classes * count, width].  Folds: exactly, into a linear head over normalised features.
Identity at init: yes, of zero-shot with the template that it starts from (init="a photo of a" and "a photo of a {}."); no with init= (random).
Parameters: count * width, times classes where each has its own.
Departs from the paper: it starts from "a photo of a" unless told otherwise, where the paper's best start is random with 16 vectors; all that
stands behind the longest prompt is cut off before the text tower, which changes nothing under a causal mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._language import Context, place, prompted
from vtzoo.methods._language import Vectors as Graft

GROUP = "prompt/language-driven"
PAPER = "arXiv:2109.01134"
FAMILIES = ("tokens", "maps")
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "weight_decay": 5e-4}}
__all__ = ["FAMILIES", "GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Context):
    """Knobs; see `Context`."""


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding of the text tower."""
    return (place(anatomy, config, "coop"),)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the vectors in its prompts."""
    return prompted(old, config)

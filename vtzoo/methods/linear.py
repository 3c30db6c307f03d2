"""Linear probe: train a linear classifier on frozen pooled features (He et al. 2021, arXiv:2111.06377, A.1).

    logits = W h + b,   h = pooled features of the frozen backbone

Shapes: W [classes, features], b [classes].  Folds: exactly (it is the head).  Identity at init: yes.
Parameters: (features + 1) * classes, all in the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft

GROUP = "fine-tuning/head"
PAPER = "arXiv:2111.06377"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 0.0}, "maps": {"lr": 3e-3, "weight_decay": 0.0}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """No knobs."""


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - the head only
    """None: the head is every delta's own."""
    return ()

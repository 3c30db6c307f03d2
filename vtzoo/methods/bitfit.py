"""BitFit: train every bias and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199).

    b -> b'

Shapes: as the backbone's biases; stored as replacements.  Folds: exactly.  Identity at init: yes.
Parameters: the backbone's biases (0.1 % of a ViT).
Departs from the paper: all biases of a backbone count, split q and v biases included; on a network with BatchNorm most
are the norms' shifts. A key's bias has no effect under plain softmax attention and its gradient is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._replace import Replace as Graft

GROUP = "parameter/bias"
PAPER = "arXiv:2106.10199"
RECIPE = {"tokens": {"lr": 5e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """No knobs."""


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knobs
    """Every module that owns a bias."""
    return anatomy.params(n for n in anatomy.parameter_names if n.rpartition(".")[2].endswith("bias"))

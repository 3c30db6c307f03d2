"""Norm tuning: train the scale and shift of every normalisation (Frankle et al. 2020, arXiv:2003.00152).

    y = w' * (x - mean) / std + b'

Shapes: w', b' [channels]; stored as replacements.  Folds: exactly.  Identity at init: yes.
Parameters: 2 * channels per norm, channels where it has no shift (RMSNorm).
Departs from the paper: LayerNorms, GroupNorms and RMSNorms count like BatchNorms, whose statistics stay those of the
backbone; the weights around them are pretrained, not random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._replace import Replace as Graft

GROUP = "parameter/weight-and-bias"
PAPER = "arXiv:2003.00152"
RECIPE = {"tokens": {"lr": 5e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """No knobs."""


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knobs
    """Every norm that scales."""
    found = anatomy.params(s.key(p) for s in anatomy.norms for p in ("weight", "bias"))
    if not found:
        raise UsageError("this backbone has no normalisation with a scale to train", "use bitfit or ssf instead")
    return found

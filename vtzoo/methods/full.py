"""Full fine-tuning: train every parameter of the backbone (Kornblith et al. 2018, arXiv:1805.08974).

    p -> p'

Shapes: as the backbone's parameters; stored as replacements.  Folds: exactly.  Identity at init: yes.
Parameters: the backbone's, or those that `targets` names.
With targets=*blocks.0.* or targets=norm it is surgical fine-tuning (Lee et al. 2022, arXiv:2210.11466): the layers that suit
the shift, and nothing else; `vtzoo sensitivity` says which a task depends on.
Departs from the paper: BatchNorm statistics stay those of the backbone, in training too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._replace import Replace as Graft
from vtzoo.methods._replace import chosen

GROUP = "fine-tuning/full"
PAPER = "arXiv:1805.08974"
RECIPE = {"tokens": {"lr": 1e-4, "weight_decay": 1e-2}, "maps": {"lr": 3e-4, "weight_decay": 1e-2}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        targets: which parameters: a glob over their full names, or a role or name of the layers that own them.
    """

    targets: tuple[str, ...] = ("*",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every module that owns a chosen parameter, the head left out."""
    return anatomy.params(chosen(anatomy, config.targets))

"""Linear probe: train a linear classifier on frozen pooled features (He et al. 2021, arXiv:2111.06377, A.1).

    logits = W h + b,   h = pooled features of the frozen backbone

    lr=[1e-3,1e-2]        a probe for each, and each weight_decay; the best on the validation images is kept

On a dual encoder h is normalised, and W and b start as its text tower makes them of the classes' names.

Shapes: W [classes, features], b [classes].  Folds: exactly (it is the head).  Identity at init: yes.
Parameters: (features + 1) * classes, all in the head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Graft
from vtzoo.text_head import TextHead

GROUP = "fine-tuning/head"
PAPER = "arXiv:2111.06377"
RECIPE = {"tokens": {"lr": 1e-2, "weight_decay": 0.0}, "maps": {"lr": 3e-3, "weight_decay": 0.0}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "fold_head", "head", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs, of `vtzoo train` alone.

    Attributes:
        lr: learning rates of probes that are trained side by side on the same features.
        weight_decay: their weight decays; each goes with each learning rate.
    """

    lr: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] | None = None

    def __post_init__(self) -> None:
        if () in (self.lr, self.weight_decay):
            raise ValueError("a list is empty")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - the head only
    """None: the head is every delta's own.

    Raises:
        UsageError: many probes are wanted, and a network has one head.
    """
    if config != Config():
        raise UsageError("linear[lr=…] are many probes, and a network has one head", "vtzoo train trains them")
    return ()


def fold_head(tensors: Mapping[str, Tensor], config: Config) -> Mapping[str, Tensor]:  # noqa: ARG001 - every head takes both
    """As they are: the classifier is the backbone's own, whatever that is made of."""
    return tensors


def head(old: nn.Module, config: Config) -> nn.Module | None:  # noqa: ARG001 - every head takes both
    """What a text tower makes of class names, as a layer to be trained; timm's own elsewhere."""
    return old.linear() if isinstance(old, TextHead) else None

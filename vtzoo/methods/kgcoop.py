"""KgCoOp: learned context that is held near the hand-written prompts (Yao et al. 2023, arXiv:2303.13283, eq. 5).

    loss = cross-entropy + weight (1 - mean_c cos(T_c, T0_c)),   T as in CoOp, T0 of the class names in their templates, from the frozen tower

Shapes: v [count, width of the text tower], or [classes * count, width].  Folds: exactly, into a linear head over normalised features.
Identity at init: yes, of zero-shot with the template that it starts from; no with init= (random).
Parameters: count * width, times classes where each has its own.
Departs from the paper: the distance is the official code's 1 - cos, which is half of the paper's squared one, and weight=8 is the code's;
the mean is over all classes; T0 is of several templates where there are several, and of the text tower as it stands when the training starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.methods._language import Context, place, prompted
from vtzoo.methods._language import Vectors as Graft
from vtzoo.own_loss import Own, Seen

GROUP = "prompt/language-driven"
PAPER = "arXiv:2303.13283"
FAMILIES = ("tokens", "maps")
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "weight_decay": 5e-4}}
__all__ = ["FAMILIES", "GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "loss", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Context):
    """Knobs; see `Context` for the others.

    Attributes:
        weight: of the distance to the hand-written prompts.
    """

    weight: Annotated[float, Field(ge=0)] = 8.0


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding of the text tower."""
    return (place(anatomy, config, "kgcoop"),)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the vectors in its prompts."""
    return prompted(old, config)


def loss(model: Any, config: Config) -> Own:
    """The plain loss and the distance to the hand-written prompts."""
    wanted, _ = model.clip_head.zero_shot()

    def held(plain: Tensor, seen: Seen) -> Tensor:
        found: Any = seen.head
        weight = found.layer()[0].to(wanted.dtype)
        near = F.cosine_similarity(weight, wanted.to(weight.device), dim=-1, eps=1e-7)
        return plain + config.weight * (1 - near.mean())

    return held

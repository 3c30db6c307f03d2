"""Task residual: learn what to add to the texts' embeddings (TaskRes, Yu et al. 2023, arXiv:2211.10277, eq. 4-5).

    t'_c = t_c + alpha x_c      logits = exp(s) f normalise(t')' + b,   f normalised, t as the text tower gives it

Shapes: x [classes, embedding].  Folds: exactly, into a linear head over normalised features.  Identity at init: yes, of zero-shot (x = 0).
Parameters: classes * embedding, all in the head.
Departs from the paper: with several templates t_c has the direction of zero-shot's, the mean of normalised embeddings, and the mean of their lengths,
so that it starts from zero-shot there, too; the authors' code (github.com/geekyutao/TaskRes) takes the mean of embeddings as they are.
The base is the pretrained one, not their tuned "enhanced base".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft
from vtzoo.methods._language import spoken
from vtzoo.tensors import working
from vtzoo.text_head import TextHead

GROUP = "adapter/sequential"
PAPER = "arXiv:2211.10277"
RECIPE = {"tokens": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4}}  # fmt: skip
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "fold_head", "head", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        alpha: factor of the residual.
    """

    alpha: Annotated[float, Field(gt=0)] = 0.5


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - the head only
    """None; the classifier must be one that a text tower makes."""
    spoken(anatomy, "task-residual")
    return ()


class Residual(nn.Module):
    """The texts' embeddings, and what is added to them."""

    text: Tensor
    scale: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, old: nn.Linear | TextHead, config: Config) -> None:
        super().__init__()
        self.alpha = config.alpha
        text, scale, bias = _told(old) if isinstance(old, TextHead) else _room(old)
        self.register_buffer("text", text)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.residual = nn.Parameter(torch.zeros_like(text))

    def forward(self, x: Tensor) -> Tensor:
        """[n, embedding], normalised -> [n, classes]."""
        return F.linear(x, _weight(self.text, self.residual, self.scale, self.alpha), self.bias)


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The text tower's classifier with a residual."""
    return Residual(old, config)


def fold_head(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The weight and bias that these are."""
    place = next(n for n in tensors if n.endswith("residual")).removesuffix("residual")
    own = {n: tensors[f"{place}{n}"] for n in ("text", "residual", "scale", "bias")}
    kind = working(*own.values())
    text, residual, scale, bias = (t.to(kind) for t in own.values())
    return {f"{place}weight": _weight(text, residual, scale, config.alpha), f"{place}bias": bias}


def _weight(text: Tensor, residual: Tensor, scale: Tensor, alpha: float) -> Tensor:
    return scale * F.normalize(text + alpha * residual, dim=-1)


def _told(old: TextHead) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of the classes with their lengths, the scale of logits, and their bias."""
    weight, bias = old.layer()
    lengths = old.texts().norm(dim=-1).mean(1, keepdim=True)
    scale = old.model.logit_scale.detach().exp()
    return weight / scale * lengths, scale.clone(), bias.clone()


def _room(old: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Places for a file's numbers, where no text tower is at hand."""
    return torch.ones_like(old.weight), torch.ones_like(old.weight[0, 0]), torch.zeros_like(old.weight[:, 0])

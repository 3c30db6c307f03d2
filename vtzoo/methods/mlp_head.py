"""MLP head: a small perceptron on frozen pooled features (Jia et al. 2022, arXiv:2203.12119, Mlp-k).

    logits = W_k relu(... relu(W_1 h + b_1) ...) + b_k,   h = pooled features of the frozen backbone;  with `skip`, + W_0 h

Shapes: W_1 [hidden, features], the layers between [hidden, hidden], W_k [classes, hidden], W_0 [classes, features].
Folds: no: the head is not linear (a headless fold leaves it out).  Identity at init: yes (of the features;
the head is new).
Parameters: (features + 1) * hidden + (layers - 2) * (hidden + 1) * hidden + (hidden + 1) * classes, and features * classes with
`skip`, all in the head.
Departs from the paper: two layers by default, since a thousand images seldom feed the three of its tables; no
normalisation between them. `skip` is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Graft
from vtzoo.text_head import TextHead

GROUP = "fine-tuning/head"
PAPER = "arXiv:2203.12119"
RECIPE = {
    "tokens": {"lr": 3e-3, "head_lr": 3e-3, "weight_decay": 1e-4},
    "maps": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        layers: linear layers, the classifier counted.
        hidden: their width; None means as wide as the features.
        dropout: before each layer but the first, while training.
        skip: add a linear classifier beside them, which they correct.
    """

    layers: Annotated[int, Field(ge=2)] = 2
    hidden: Annotated[int, Field(ge=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    skip: bool = False


class Skipped(nn.Module):
    """A perceptron and a linear map beside it."""

    def __init__(self, mlp: nn.Module, skip: nn.Linear) -> None:
        super().__init__()
        self.mlp, self.skip = mlp, skip

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return self.skip(x) + self.mlp(x)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - the head only
    """None; the backbone must have a linear classifier to replace."""
    if not any(isinstance(anatomy.model.get_submodule(n), nn.Linear | TextHead) for n in anatomy.head):
        raise UsageError("this backbone has no linear classifier to replace", "build it with num_classes=N")
    return ()


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The perceptron that stands in for timm's linear classifier."""
    width = config.hidden or old.in_features
    sizes = [old.in_features, *[width] * (config.layers - 1), old.out_features]
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for fan_in, out in pairwise(sizes[1:]):
        layers += [nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(fan_in, out)]
    mlp = nn.Sequential(*layers)
    return Skipped(mlp, nn.Linear(old.in_features, old.out_features, bias=False)) if config.skip else mlp

"""CLIP-Adapter: a bottleneck on the image's features, before the classifier (Gao et al. 2021, arXiv:2110.04544, eq. 3-5).

    A(f) = relu(up relu(down f)),   f' = ratio A(f) + (1 - ratio) f,   logits = W (|f| f' / |f'|) + b

On a dual encoder |f| = 1 and W, b are what its text tower makes of the classes' names, which are not trained: that is the paper's, since
layers without biases turn c f into c A(f), so that f may be normalised before as well as behind them. On any other backbone W and b are
the linear classifier, which is trained with them.

Shapes: down [features / reduction, features], up [features, features / reduction].
Folds: no: the adapter has an activation between its two matrices, and its output is normalised (a headless fold leaves it out).
Identity at init: yes (of the features; the adapter starts at random, and with it the logits).
Parameters: 2 * features * (features / reduction), in the head.
Departs from the paper: the outer relu is the authors' code's (github.com/gaopengcuhk/CLIP-Adapter), the paper has none; the classifier's weights
have no adapter of their own, as in that code; the ratio is one number, not searched for each data set.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.graft import Graft
from vtzoo.methods._features import hold, sites
from vtzoo.text_head import TextHead

GROUP = "adapter/sequential"
PAPER = "arXiv:2110.04544"
RECIPE = {"tokens": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "head_lr": 2e-3, "weight_decay": 5e-4}}  # fmt: skip
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        ratio: of what the adapter gives; the rest are the features as they were.
        reduction: how many times narrower its middle is.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    reduction: Annotated[int, Field(ge=1)] = 4


class Adapted(nn.Module):
    """An adapter and the classifier behind it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, old: nn.Linear | TextHead, config: Config) -> None:
        super().__init__()
        width, self.ratio = old.in_features, config.ratio
        hidden = max(1, width // config.reduction)
        hold(self, old)
        self.down, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, features] -> [n, classes]."""
        mixed = self.ratio * F.relu(self.up(F.relu(self.down(x)))) + (1 - self.ratio) * x
        return F.linear(F.normalize(mixed, dim=-1) * x.norm(dim=-1, keepdim=True), self.weight, self.bias)


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The adapter before the classifier that was there."""
    return Adapted(old, config)

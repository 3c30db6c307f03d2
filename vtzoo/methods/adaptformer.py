"""AdaptFormer: a bottleneck parallel to each block's MLP (Chen et al. 2022, arXiv:2205.13535).

    y = MLP(x) + scale * (U relu(D x + d) + u),   x = what the MLP is given

Shapes: D [rank, channels], d [rank], U [channels, rank], u [channels].
Folds: no: a ReLU stands between its two matrices.  Identity at init: yes (D Kaiming-uniform, U and the biases zero).
Parameters: 2 * rank * channels + rank + channels per block.
Departs from the paper: as its formula has it, x is normalised (the authors' code reads what stands before the norm); a layer scale after the MLP covers the branch too; where a block has no MLP (ResNet,
EfficientNet) the branch stands beside the whole block if that keeps its shape, as 1x1 convolutions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import MLP, Bottleneck, hosts

GROUP = "adapter/parallel"
PAPER = "arXiv:2205.13535"
RECIPE = {"tokens": {"lr": 8e-3, "weight_decay": 1e-4}, "maps": {"lr": 2e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottleneck.
        scale: factor of the branch.
        dropout: on its hidden units while training.
    """

    rank: Annotated[int, Field(ge=1)] = 64
    scale: Annotated[float, Field(gt=0)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - no knob chooses
    """The MLPs of the blocks; of the blocks without one those that keep their shape."""
    found = [s for s in hosts(anatomy, MLP) if tuple(s.facts["x"]) == s.shape]
    if not found:
        raise UsageError(
            "no block of this backbone has an MLP as its own part, or keeps its shape, for an adapter to stand beside",
            "use adapter or lora instead",
        )
    return found


class Graft(Bottleneck):
    """A bottleneck from a module's input to its output."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config.rank, "relu", config.dropout)
        self.scale = config.scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch of the input."""
        return y + self.scale * self.branch(x)

"""The networks that are searched: ConvNeXts whose four stages have a depth and a kernel size each.

timm builds every one of them of JSON arguments (`depths`, `kernel_sizes`, `dims`). A stage is a plain map from what the stage before gives, its padding keeps the
size for any odd kernel, and no norm gathers statistics, so that a stage can be trained alone and put to any others. Fewer kinds of operators
than in an EfficientNet, too: what a stage takes in a runtime adds up better. Layer scales start at 1: 1e-6, timm's first value, keeps blocks silent for
longer than a stage is trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from vtzoo.backbone import create

ARCH, STAGES, LEAST_PIXELS = "convnext_atto", 4, 32
Pick = tuple[int, int]
"""A stage's depth in blocks, and the side of its kernels."""


@dataclass(frozen=True)
class Space:
    """All networks of a width.

    Attributes:
        width: channels of the first stage; each further stage has twice as many.
        depths: of a stage, in rising order.
        kernels: sides, odd.
    """

    width: int
    depths: tuple[int, ...]
    kernels: tuple[int, ...]

    @property
    def picks(self) -> list[Pick]:
        """What each stage can be."""
        return list(product(self.depths, self.kernels))

    @property
    def smallest(self) -> tuple[Pick, ...]:
        """The network of the fewest parameters."""
        return (min(self.picks),) * STAGES

    def arguments(self, picks: Sequence[Pick]) -> dict[str, Any]:
        """timm's, for these stages."""
        return {
            "depths": [depth for depth, _ in picks], "kernel_sizes": [kernel for _, kernel in picks],
            "dims": [self.width << i for i in range(STAGES)], "ls_init_value": 1.0,
        }  # fmt: skip

    def network(self, picks: Sequence[Pick], classes: int) -> nn.Module:
        """Fresh, with a classifier where there are classes."""
        return create(ARCH, pretrained=False, num_classes=classes, **self.arguments(picks))

    def stages(self, pick: Pick) -> Iterator[nn.Module]:
        """Each stage as this pick."""
        made: Any = self.network((pick,) * STAGES, 0)
        yield from made.stages


def written(picks: Sequence[Pick]) -> str:
    """A network in a word, such as "2x7 1x3 3x5 1x3": depth x kernel, stage by stage."""
    return " ".join(f"{depth}x{kernel}" for depth, kernel in picks)

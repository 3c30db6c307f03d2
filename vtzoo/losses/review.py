"""Review: each of the teacher's maps is met by the student's maps from there on, the late ones fused into the early ones (Chen et al. 2021, ReviewKD, arXiv:2104.09044).

    ABF, from the last map to the first:   x = conv1(m),  y = what came from behind at x's size,  (u, v) = sigmoid(conv([x, y]))
                                           x = u x + v y, goes on to the map before;   conv3(x at m_t's size) is compared
    HCL:   h(a, b) = (mse(a, b) + sum_l 2^-l mse(pool_l a, pool_l b)) / (1 + sum_l 2^-l),   l-th of the pools to 4x4, 2x2, 1x1 below a's height
    loss = sum over maps of h(conv3(x), m_t)

The convolutions, each with a BatchNorm, are trained beside the student and thrown away. Shapes: maps [batch, channels, height,
width], any on either side. Needs no labels.
Departs from the paper: maps as timm gives them, behind their activations; the pooled features are no further map; the weight doesn't
grow over the first epochs.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.losses._outputs import Outputs, Shapes, pairs

PAPER = "arXiv:2104.09044"
NEEDS = ("maps",)
_MIDDLE = 512
"""Most channels between the convolutions."""


def review(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:  # noqa: ARG001 - every loss takes labels
    """Hierarchical context loss of the fused maps."""
    return torch.stack([_context(s, t) for s, t in pairs(student, teacher)]).sum()


def _context(ours: Tensor, theirs: Tensor) -> Tensor:
    height, share, shares = ours.shape[-2], 1.0, 1.0
    loss = F.mse_loss(ours, theirs)
    for side in (4, 2, 1):
        if side < height:
            share /= 2
            shares += share
            loss = loss + share * F.mse_loss(F.adaptive_avg_pool2d(ours, side), F.adaptive_avg_pool2d(theirs, side))
    return loss / shares


def bridge(ours: Shapes, theirs: Shapes) -> nn.Module:
    """The fusions, one for each pair of maps."""
    return _Fusions(ours, theirs)


class _Fusions(nn.Module):
    def __init__(self, ours: Shapes, theirs: Shapes) -> None:
        super().__init__()
        middle, last = min(_MIDDLE, ours.maps[-1][0]), len(ours.maps) - 1
        both = enumerate(zip(ours.maps, theirs.maps, strict=True))
        self.fusions = nn.ModuleList(_Fusion(s[0], middle, t[0], fuses=i < last) for i, (s, t) in both)
        self.sizes = [m[1:] for m in theirs.maps]

    def forward(self, student: Outputs) -> Outputs:
        behind: Tensor | None = None
        found: list[Tensor] = []
        for fusion, m, size in reversed(list(zip(self.fusions, student.maps, self.sizes, strict=True))):
            out, behind = fusion(m, behind, size)
            found.insert(0, out)
        return replace(student, maps=tuple(found))


class _Fusion(nn.Module):
    """Attention based fusion: a map with what came from behind."""

    def __init__(self, channels: int, middle: int, out: int, *, fuses: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(channels, middle, 1, bias=False)
        spread = nn.Conv2d(middle, out, 3, padding=1, bias=False)
        for conv in (narrow, spread):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(narrow, nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(spread, nn.BatchNorm2d(out))
        self.weigh = nn.Conv2d(2 * middle, 2, 1) if fuses else None

    def forward(self, m: Tensor, behind: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is compared, and what goes on."""
        x = self.enter(m)
        if self.weigh is not None and behind is not None:
            behind = F.interpolate(behind, x.shape[-2:], mode="nearest")
            u, v = self.weigh(torch.cat([x, behind], 1)).sigmoid().chunk(2, 1)
            x = u * x + v * behind
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.leave(x), x

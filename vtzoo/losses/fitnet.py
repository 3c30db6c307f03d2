"""FitNet: match the teacher's maps through a 1x1 convolution (Romero et al. 2014, arXiv:1412.6550, eq. 3).

    loss = mean over maps of mean((resize(C m_s) - m_t)^2)

C, with a bias, one for each map, is trained beside the student and thrown away. Shapes: maps [batch, channels, height, width];
mean over batch, channels and places. Needs no labels.
Departs from the paper: taught all along, not in a stage of its own before; C sees one place, and other sizes are met by resizing;
without the factor 1/2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.losses._maps import resized
from vtzoo.losses._outputs import Outputs, Shapes, pairs

PAPER = "arXiv:1412.6550"
NEEDS = ("maps",)
Mode = Literal["bilinear", "bicubic"]


def fitnet(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,  # noqa: ARG001 - every loss takes labels
    *,
    interpolation: Mode = "bilinear",  # noqa: ARG001 - the bridge's
) -> Tensor:
    """Mean squared difference of the maps."""
    return torch.stack([F.mse_loss(s, t) for s, t in pairs(student, teacher)]).mean()


def bridge(ours: Shapes, theirs: Shapes, *, interpolation: Mode) -> nn.Module:
    """C and the resizing for each pair of maps."""
    return _Regressors(ours, theirs, interpolation)


class _Regressors(nn.Module):
    def __init__(self, ours: Shapes, theirs: Shapes, mode: Mode) -> None:
        super().__init__()
        both = list(zip(ours.maps, theirs.maps, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(s[0], t[0], 1) for s, t in both)
        self.sizes, self.mode = [t[1:] for _, t in both], mode

    def forward(self, student: Outputs) -> Outputs:
        each = zip(self.convs, student.maps, self.sizes, strict=True)
        return replace(student, maps=tuple(self._met(conv, m, size) for conv, m, size in each))

    def _met(self, conv: nn.Module, m: Tensor, size: tuple[int, int]) -> Tensor:
        """The convolution where there are fewer places: it and the resizing may change places."""
        if m.shape[-2] * m.shape[-1] > size[0] * size[1]:
            return conv(resized(m, size, self.mode))
        return resized(conv(m), size, self.mode)

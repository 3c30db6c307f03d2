"""Attention: look where the teacher looks (Zagoruyko and Komodakis 2016, Attention Transfer, arXiv:1612.03928, sec. 3.1).

    Q(m) = a / |a|,   a = mean over channels of |m|^p
    loss = sum over maps of mean((Q(m_s) - Q(m_t))^2)

Shapes: maps [batch, channels, height, width]; any channels on either side; mean over batch and places. Where sizes differ
the student's a is resized. Needs no labels. The authors' weight is 1000: `kd+1000*attention`.
Departs from the paper: the mean of squares as the authors' code has it; the paper's eq. 2 has the norm of the difference.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._maps import resized
from vtzoo.losses._outputs import Outputs, pairs

PAPER = "arXiv:1612.03928"
NEEDS = ("maps",)


def attention(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,  # noqa: ARG001 - every loss takes labels
    *,
    p: Annotated[float, Field(ge=1)] = 2.0,
) -> Tensor:
    """Squared difference of attention maps."""
    found: list[Tensor] = []
    for ours, theirs in pairs(student, teacher):
        wanted = _looks(theirs, p)
        seen = resized(_looks(ours, p), (wanted.shape[-2], wanted.shape[-1]))
        found.append(F.mse_loss(F.normalize(seen.flatten(1)), F.normalize(wanted.flatten(1))))
    return torch.stack(found).sum()


def _looks(m: Tensor, p: float) -> Tensor:
    """[batch, channels, height, width] -> [batch, 1, height, width]."""
    return m.abs().pow(p).mean(1, keepdim=True)

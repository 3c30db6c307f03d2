"""Feature: match the teacher's pooled features through a linear projection (Romero et al. 2014, FitNets, arXiv:1412.6550).

    loss = mean((P h_s - (h_t - mean) / std)^2)          or      1 - cos(P h_s, (h_t - mean) / std)

Shapes: features [batch, width]. The teacher's are standardised per dimension over the training images, so that no
dimension rules (PHI-S, arXiv:2410.01680); P is trained beside the student and thrown away. Needs no labels.
Departs from the paper: at the pooled output instead of a hint layer.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._outputs import Outputs, given

PAPER = "arXiv:1412.6550"
NEEDS = ("features",)


def feature(student: Outputs, teacher: Outputs, labels: Tensor, *, kind: Literal["mse", "cosine"] = "mse") -> Tensor:  # noqa: ARG001 - every loss takes labels
    """Distance of projected to standardised features."""
    ours, theirs = given(student.features).float(), given(teacher.features).float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
    return F.mse_loss(ours, theirs)

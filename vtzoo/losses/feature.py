"""Feature: match the teacher's pooled features through a linear projection (Romero et al. 2014, FitNets, arXiv:1412.6550).

    loss = mean((P h_s - g(h_t))^2)          or      1 - cos(P h_s, g(h_t))

P, linear with a bias, is trained beside the student and thrown away. g is fitted on training images: `std` gives each dimension
mean 0 and deviation 1, so that none rules; `phi-s` does so by a rotation and one scale for all, which keeps the proportions of
distances (Ranzinger et al. 2024, arXiv:2410.01680); `none` leaves the features.

Shapes: features [batch, width]; mean over batch and width. Needs no labels.
Departs from the paper: at the pooled output instead of a hint layer (`fitnet` has maps). PHI-S at widths without a Hadamard matrix
takes another rotation to the same end, and sees several teachers side by side as one.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.losses._outputs import Outputs, Shapes, given, taught
from vtzoo.losses._standard import phi_s, scored

PAPER = "arXiv:1412.6550"
NEEDS = ("features",)
Form = Literal["std", "phi-s", "none"]


def feature(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,  # noqa: ARG001 - every loss takes labels
    *,
    kind: Literal["mse", "cosine"] = "mse",
    standard: Form = "std",  # noqa: ARG001 - the form's
) -> Tensor:
    """Distance of projected to standardised features."""
    ours, theirs = given(student.features), taught(teacher.features)
    if kind == "cosine":
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
    return F.mse_loss(ours, theirs)


def standard(features: Tensor, width: int, *, standard: Form) -> nn.Module:  # noqa: ARG001 - P makes the widths equal
    """What the teacher's features are taken to, fitted on [n, width of the teacher]."""
    if standard == "none":
        return nn.Identity()
    return scored(features) if standard == "std" else phi_s(features)


def bridge(ours: Shapes, theirs: Shapes) -> nn.Module:
    """P."""
    return _Projection(ours.features, theirs.features)


class _Projection(nn.Module):
    def __init__(self, ours: int, theirs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(ours, theirs)

    def forward(self, student: Outputs) -> Outputs:
        return replace(student, features=self.linear(student.features))

"""KDEP: the student's own features are to be the teacher's main components (He et al. 2022, arXiv:2203.05180).

    V: the first right singular vectors of the teacher's features over training images, their mean taken off, as many as the student is wide
    loss = mean((h_s - g(V' (h_t - mean)))^2),      g(x) = sign(x) |x / T|^(1 / n)

g is the paper's power temperature scaling: it lifts what SVD left small. T has the unit of the teacher's features. No
projector is trained: what learns is what stays. The authors' weight is 3: `3*kdep`.

Shapes: features [batch, width]; mean over batch and width. Needs no labels. The student must not be wider than the teacher.
Departs from the paper: features are those behind the last activation, as timm pools them, and not those before it; a student whose last
activation is a ReLU can't answer what is negative. The authors' code, n = 3 and T = 0.1, is of a ResNet-50's.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.losses._outputs import Outputs, given, taught
from vtzoo.losses._standard import Projected, principal

PAPER = "arXiv:2203.05180"
NEEDS = ("features",)
Temperature = Annotated[float, Field(gt=0)]
Power = Annotated[float, Field(ge=1)]


def kdep(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,  # noqa: ARG001 - every loss takes labels
    *,
    temperature: Temperature = 0.1,  # noqa: ARG001 - the form's
    power: Power = 3.0,  # noqa: ARG001 - likewise
) -> Tensor:
    """Mean squared difference from the scaled components."""
    return F.mse_loss(given(student.features), taught(teacher.features))


def standard(features: Tensor, width: int, *, temperature: float, power: float) -> nn.Module:
    """V and g, fitted on features [n, width of the teacher].

    Raises:
        ShapeMismatch: the student is wider than the teacher.
        UsageError: fewer images than components.
    """
    images, theirs = features.shape
    if width > theirs:
        raise ShapeMismatch(
            f"the student has {width} features, {theirs} components of the teacher are all there are",
            "choose a student of at most that width, or --loss feature",
        )
    if images <= width:
        raise UsageError(
            f"{width} components of the teacher's features can't be found on {images} images",
            f"give more than {width} images, or --loss feature",
        )
    mean, _, vectors = principal(features)
    main = vectors.flip(1)[:, :width].contiguous().to(mean.dtype)
    return nn.Sequential(Projected(mean, main), _Scaled(temperature, power))


class _Scaled(nn.Module):
    """sign(x) |x / T|^(1 / n)."""

    def __init__(self, temperature: float, power: float) -> None:
        super().__init__()
        self.temperature, self.power = temperature, power

    def forward(self, components: Tensor) -> Tensor:
        return torch.sign(components) * (components.abs() / self.temperature) ** (1 / self.power)

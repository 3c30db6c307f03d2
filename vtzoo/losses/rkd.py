"""RKD: the distances between images, and the angles of any three (Park et al. 2019, arXiv:1904.05068).

    d_ij = |h_i - h_j| / mean of those above 0                 a_ijk = cos of the angle at j between h_i - h_j and h_k - h_j
    loss = distance * mean_ij huber(d_ij^s - d_ij^t) + angle * mean_ijk huber(a_ijk^s - a_ijk^t)

Shapes: features [batch, width], of any width on either side; huber's corner at 1; means over all pairs and triples, those of one image
with itself (0 on both sides) included. Needs no labels; one image alone has no relations and a loss of 0. Memory grows with batch^2 width
and batch^3.
Departs from the paper: features of two images that are equal have no direction and give no gradient of angles, where the formula's
has no bound.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._outputs import Outputs, exact, given, taught

PAPER = "arXiv:1904.05068"
NEEDS = ("features",)


def rkd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,  # noqa: ARG001 - every loss takes labels
    *,
    distance: Annotated[float, Field(ge=0)] = 25.0,
    angle: Annotated[float, Field(ge=0)] = 50.0,
) -> Tensor:
    """Relations of the batch's images.

    Args:
        student: features.
        teacher: features.
        labels: not looked at.
        distance: weight of the pairs.
        angle: weight of the triples.
    """
    ours, theirs = given(student.features), taught(teacher.features)
    with exact(ours):
        (far, turned), (far_t, turned_t) = _relations(ours), _relations(theirs)
        return distance * F.smooth_l1_loss(far, far_t) + angle * F.smooth_l1_loss(turned, turned_t)


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [batch, batch] in units of their mean, and cosines [batch, batch, batch]."""
    apart = features - features[:, None]
    far = torch.linalg.vector_norm(apart, dim=-1)
    known = far > 0
    mean = far.sum() / known.sum().clamp(min=1)
    towards = apart / far.where(known, torch.inf)[..., None]
    return far / mean.where(mean > 0, 1), towards @ towards.mT

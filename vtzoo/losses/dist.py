"""DIST: correlate with the teacher, over the classes of an image and over the images of a class (Huang et al. 2022, arXiv:2205.10536).

    p = softmax(z / T),  r(a, b) = Pearson's correlation
    loss = ce * CE(z_s, y) + T^2 * (beta * mean_i (1 - r(p_s[i, :], p_t[i, :])) + gamma * mean_c (1 - r(p_s[:, c], p_t[:, c])))

Shapes: logits [batch, classes], labels [batch] or [batch, classes]; mean over the batch. Without labels (all -1) there is no CE.
Departs from the paper: what has no spread on the student's side (logits that are all equal, a batch of one image) counts as
uncorrelated and gives no gradient, where the formula's has no bound. torchdistill's recipe for ImageNet has beta and gamma 2.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.losses._logits import beside
from vtzoo.losses._outputs import Outputs, given, taught

PAPER = "arXiv:2205.10536"
NEEDS = ("logits",)
_EQUAL = 1e-6
"""A spread of this part of the probabilities is rounding."""


def dist(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    beta: Annotated[float, Field(ge=0)] = 1.0,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    ce: Annotated[float, Field(ge=0)] = 1.0,
) -> Tensor:
    """Relations between classes and between images.

    Args:
        student: logits.
        teacher: logits.
        labels: of either kind, or none.
        beta: weight of the relations within an image.
        gamma: weight of the relations within a class.
        temperature: of both.
        ce: weight of the labels.
    """
    ours, theirs = given(student.logits), taught(teacher.logits)
    soft = [(z / temperature).softmax(-1) for z in (ours, theirs)]
    related = beta * _unlike(*soft) + gamma * _unlike(*(p.T for p in soft))
    return beside(temperature**2 * related, ours, labels, ce)


def _unlike(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - the correlation of each row, their mean."""
    sizes = torch.linalg.vector_norm(ours.detach(), dim=-1)
    (a, b), (c, d) = (_centred(rows) for rows in (ours, theirs))
    correlation = (a * c).sum(-1) / (b.clamp(min=1e-8) * d.clamp(min=1e-8))
    return 1 - correlation.where(b > _EQUAL * sizes, 0).mean()


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Without their mean, and how long each is."""
    rows = rows - rows.mean(-1, keepdim=True)
    return rows, torch.linalg.vector_norm(rows, dim=-1)

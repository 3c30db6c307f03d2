"""KD: match the teacher's softened class probabilities (Hinton et al. 2015, arXiv:1503.02531, sec. 2).

    loss = alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) * CE(z_s, y)

With `standardise` the first term takes z-scores of both sides' logits, (z - mean(z)) / (1e-7 + std(z)) of each image, so that
the student need not have the teacher's range (Sun et al. 2024, arXiv:2403.01427).

Shapes: logits [batch, classes], labels [batch] or [batch, classes]; nats, mean over the batch. Without labels (all -1) alpha
counts as 1.
Departs from the paper: logits that are all equal have z-scores of zero and give no gradient, where the formula gives one of 1e7.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._logits import labelled, softened
from vtzoo.losses._outputs import Outputs, given, taught

PAPER = "arXiv:1503.02531"
NEEDS = ("logits",)
_EQUAL = 1e-6
"""A standard deviation of logits below this is rounding."""


def kd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
    standardise: bool = False,
) -> Tensor:
    """Soft targets, and the true labels beside them."""
    ours, theirs = given(student.logits), taught(teacher.logits)
    scores = (_scores(ours), _scores(theirs)) if standardise else (ours, theirs)
    soft = softened(*scores, temperature)
    return alpha * soft + (1 - alpha) * F.cross_entropy(ours, labels) if labelled(labels) else soft


def _scores(logits: Tensor) -> Tensor:
    spread = logits.std(-1, keepdim=True)
    scores = (logits - logits.mean(-1, keepdim=True)) / (1e-7 + spread)
    return scores.where(spread > _EQUAL, 0)

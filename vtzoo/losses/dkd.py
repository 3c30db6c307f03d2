"""DKD: the target class and the others are matched apart (Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv:2203.08679).

    p  = softmax(z / T),  b = (p_y, 1 - p_y),  q = softmax(z / T without class y)
    loss = ce * CE(z_s, y) + T^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))

y: the image's label; of a mixed image the class with the larger part; without a label (-1) the teacher's decision, and no CE.
Shapes: logits [batch, classes], labels [batch] or [batch, classes]; nats, mean over the batch.
Departs from the authors' code: the terms don't grow over the first 20 epochs; class y is left out of q, not pushed 1000 down.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._logits import beside
from vtzoo.losses._outputs import Outputs, given, taught

PAPER = "arXiv:2203.08679"
NEEDS = ("logits",)


def dkd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(ge=0)] = 8.0,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    ce: Annotated[float, Field(ge=0)] = 1.0,
) -> Tensor:
    """Target and others decoupled.

    Args:
        student: logits.
        teacher: logits.
        labels: of either kind, or none.
        alpha: weight of how sure the teacher is of the target.
        beta: weight of what it thinks of the others.
        temperature: of both.
        ce: weight of the labels.
    """
    ours, theirs = given(student.logits), taught(teacher.logits)
    target = labels.argmax(-1) if labels.ndim > 1 else labels.where(labels >= 0, theirs.argmax(-1))
    terms = zip(_apart(ours / temperature, target), _apart(theirs / temperature, target), strict=True)
    sure, others = (F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in terms)
    loss = temperature**2 * (alpha * sure + beta * others)
    return beside(loss, ours, labels, ce)


def _apart(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target against all others [batch, 2], and of the others among themselves [batch, classes - 1]."""
    mask = F.one_hot(target, logits.shape[-1]).bool()
    others = logits[~mask].view(len(logits), -1)
    both = torch.stack([logits[mask], others.logsumexp(-1)], -1)
    return both.log_softmax(-1), others.log_softmax(-1)

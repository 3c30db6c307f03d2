"""KD: match the teacher's softened class probabilities (Hinton et al. 2015, arXiv:1503.02531, sec. 2).

    loss = alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) * CE(z_s, y)

Shapes: logits [batch, classes], labels [batch]; nats, mean over the batch. Without labels (all -1) alpha counts as 1.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._outputs import Outputs, given

PAPER = "arXiv:1503.02531"
NEEDS = ("logits",)


def kd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
) -> Tensor:
    """Soft targets, and the true labels beside them."""
    ours, theirs = given(student.logits).float(), given(teacher.logits).float()
    soft = F.kl_div(
        F.log_softmax(ours / temperature, -1),
        F.log_softmax(theirs / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    if bool((labels < 0).any()):
        return temperature**2 * soft
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(ours, labels)

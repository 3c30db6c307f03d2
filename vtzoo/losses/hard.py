"""Hard: learn the teacher's decisions as labels (Touvron et al. 2020, DeiT, arXiv:2012.12877, eq. 3).

    loss = weight * CE(z_s, argmax z_t) + (1 - weight) * CE(z_s, y)

Shapes: logits [batch, classes], labels [batch] or [batch, classes]; nats, mean over the batch. Without labels (all -1) weight
counts as 1.
Departs from the paper: one classifier learns both; `token` has the distillation token.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._logits import labelled
from vtzoo.losses._outputs import Outputs, given, taught

PAPER = "arXiv:2012.12877"
NEEDS = ("logits",)


def hard(
    student: Outputs, teacher: Outputs, labels: Tensor, *, weight: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> Tensor:
    """Cross-entropy with the teacher's argmax."""
    ours = given(student.logits)
    followed = F.cross_entropy(ours, taught(teacher.logits).argmax(-1))
    return weight * followed + (1 - weight) * F.cross_entropy(ours, labels) if labelled(labels) else followed

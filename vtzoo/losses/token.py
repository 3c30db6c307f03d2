"""Token: the classifier learns the labels, the distillation token beside it the teacher (Touvron et al. 2020, DeiT, arXiv:2012.12877).

    hard:  loss = weight * CE(d_s, argmax z_t) + (1 - weight) * CE(z_s, y)                                          eq. 3
    soft:  loss = weight * T^2 * KL(softmax(z_t / T) || softmax(d_s / T)) + (1 - weight) * CE(z_s, y)               eq. 2

z_s: the student's logits; d_s: those at its token. The paper's soft form is `token[kind=soft,weight=0.1]`.
Shapes: logits and token [batch, classes], labels [batch] or [batch, classes]; nats, mean over the batch. T is of `soft` alone.
Departs from the paper: an image without a label (-1) has the teacher's decision for one, as both classifiers answer in the end;
the authors' code divides the KL by the classes, too, the paper doesn't.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._logits import softened
from vtzoo.losses._outputs import Outputs, given, taught

PAPER = "arXiv:2012.12877"
NEEDS = ("logits", "token")


def token(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    kind: Literal["hard", "soft"] = "hard",
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 3.0,
) -> Tensor:
    """Two classifiers, two teachers."""
    ours, theirs = given(student.token), taught(teacher.logits)
    decided = theirs.argmax(-1)
    followed = F.cross_entropy(ours, decided) if kind == "hard" else softened(ours, theirs, temperature)
    known = labels.where(labels >= 0, decided) if labels.ndim == 1 else labels
    return weight * followed + (1 - weight) * F.cross_entropy(given(student.logits), known)

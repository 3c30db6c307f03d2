"""What losses on logits share.

Labels are class indices [batch], all -1 where there are none, or probabilities [batch, classes] where images were mixed:
`F.cross_entropy` takes both.
"""

from torch import Tensor
from torch.nn import functional as F


def labelled(labels: Tensor) -> bool:
    """Whether there are labels."""
    return not bool((labels < 0).any())


def beside(loss: Tensor, logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """A loss and, where there are labels, so many times their cross-entropy."""
    return loss + weight * F.cross_entropy(logits, labels) if labelled(labels) else loss


def softened(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(theirs / T) || softmax(ours / T)) of logits [batch, classes]; nats, mean over the batch."""
    p, q = (F.log_softmax(z / temperature, -1) for z in (theirs, ours))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)

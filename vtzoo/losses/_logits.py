"""What losses on logits share: labels of either kind, and softened probabilities.

Labels are class indices [batch], all -1 where there are none, or probabilities [batch, classes] where images were mixed.
"""

from torch import Tensor
from torch.nn import functional as F


def labelled(labels: Tensor) -> bool:
    """Whether there are labels."""
    return not bool((labels < 0).any())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """With labels of either kind; nats, mean over the batch."""
    return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype))


def softened(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(theirs / T) || softmax(ours / T)) of logits [batch, classes]; nats, mean over the batch."""
    p, q = (F.log_softmax(z / temperature, -1) for z in (theirs, ours))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)

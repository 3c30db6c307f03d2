"""What a loss compares: one network's outputs for a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Either may be absent.

    Attributes:
        logits: [batch, classes].
        features: [batch, width], pooled; the student's are projected to the teacher's width.
    """

    logits: Tensor | None = None
    features: Tensor | None = None


def given(value: Tensor | None) -> Tensor:
    """An output that the loss's NEEDS promises."""
    assert value is not None
    return value

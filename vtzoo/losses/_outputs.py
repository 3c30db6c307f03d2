"""What a loss compares: two networks' outputs for a batch.

A loss file has, beside its function:

    NEEDS       which of these outputs it looks at: "logits", "features", "maps", "token"
    bridge      optional: (student's Shapes, teacher's Shapes, *, knobs) -> a module that takes the student's Outputs to the teacher's space; it is
                trained beside the student and thrown away
    standard    optional: (a teacher's features [n, width], the student's width, *, knobs) -> a module that takes the teacher's features to the
                form in which they are taught; fitted once on training images

Both are given those of the function's knobs that they name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Any may be absent.

    Attributes:
        logits: [batch, classes]; of several teachers, their mean probabilities' logarithms.
        features: [batch, width], pooled.
        maps: [batch, channels, height, width] each, from early to late, as many of the student's as of the teacher's.
        token: [batch, classes], a student's answer at its distillation token.
    """

    logits: Tensor | None = None
    features: Tensor | None = None
    maps: tuple[Tensor, ...] = ()
    token: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of one network's outputs: the features' width, and (channels, height, width) of each map."""

    features: int = 0
    maps: tuple[tuple[int, int, int], ...] = ()


def given(value: Tensor | None) -> Tensor:
    """An output that the loss's NEEDS promises, in float32 at least."""
    assert value is not None
    return wide(value)


def taught(value: Tensor | None) -> Tensor:
    """The same of a teacher, which learns nothing itself."""
    return given(value).detach()


def pairs(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Given and taught maps side by side, from early to late."""
    assert student.maps
    return [(given(s), taught(t)) for s, t in zip(student.maps, teacher.maps, strict=True)]


def wide(value: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def exact(value: Tensor) -> torch.autocast:
    """Products are taken as they are written here, whatever precision the networks have."""
    return torch.autocast(value.device.type, enabled=False)

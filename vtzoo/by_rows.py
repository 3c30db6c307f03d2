"""Several tasks' classifiers in the place of one: each answers its own rows of a batch that is sorted by task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def class_axis(head: nn.Module) -> int:
    """Where a classifier has its classes: a convolution's channels, or the last."""
    return 1 if any(isinstance(m, nn.Conv2d) for m in head.modules()) else -1


def by_rows(heads: Sequence[nn.Module], x: Tensor, counts: Sequence[Any], most: int = 0, pad: float = 0.0) -> Tensor:
    """What each head makes of its rows, one after the other.

    Args:
        heads: one a task.
        x: [n, features, …].
        counts: rows of each task, which add up to n.
        most: classes of the result; unless given, those of the head that has most.
        pad: stands where a task has fewer.
    """
    made = [head(rows) for head, rows in zip(heads, x.split(list(counts)), strict=True)]
    axes = [class_axis(head) for head in heads]
    most = most or max(y.shape[axis] for y, axis in zip(made, axes, strict=True))
    return torch.cat([_filled(y, axis, most, pad) for y, axis in zip(made, axes, strict=True)])


def _filled(y: Tensor, axis: int, most: int, pad: float) -> Tensor:
    lacking, behind = most - y.shape[axis], y.ndim - 1 - axis % y.ndim
    return F.pad(y, (*(0, 0) * behind, 0, lacking), value=pad) if lacking else y

"""What merges work on: one tensor of every task vector at a time, and exact facts about whole task vectors.

A merge is a plain function named like its file. It takes `Vectors` and gives the merged tensor in float32; its
keyword-only parameters are its knobs. Beside it the file has

    PAPER, SYMMETRIC      the source; whether the order of the tasks is without meaning
    check(weights)        optional: refuses weights that the algorithm can't use, before anything is read

Tensors are computed when a pass comes to them and dropped after it: memory does not grow with the number of tasks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from vtzoo.errors import Corrupt

_CHUNK = 1 << 18
_HALF = 16
_BINS = 1 << _HALF
_MAGNITUDE = 0x7FFFFFFF


class Merge(Protocol):
    """The required part of a merge's module; its function is found by the file's name."""

    PAPER: str
    SYMMETRIC: bool


@dataclass(frozen=True, slots=True)
class Vector:
    """One tensor of one task vector; `value` (float32) is the receiver's own, to change in place."""

    task: int
    weight: float
    value: Tensor


@dataclass(frozen=True, slots=True)
class Vectors:
    """One tensor of every task vector. Each iteration computes those that aren't zero anew, one at a time.

    Attributes:
        name: of the tensor in the backbone.
        shape: of the tensor.
        weights: of all tasks; one that doesn't touch this tensor counts as zero.
        whole: facts about whole task vectors.
    """

    name: str
    shape: tuple[int, ...]
    weights: tuple[float, ...]
    whole: "Whole"

    def __iter__(self) -> Iterator[Vector]:
        for task in self.whole.order:
            if self.weights[task] and self.name in self.whole.names[task]:
                yield Vector(task, self.weights[task], self.whole.read(task, self.name))

    def sum(self, weights: Sequence[float] | None = None) -> Tensor:
        """Add up weight * value.

        Products are rounded before they are added: a fused step would round differently where threads divide a tensor.

        Args:
            weights: one per task, in place of the given ones.
        """
        weights, total = weights or self.weights, torch.zeros(self.shape)
        for vector in self:
            weight = weights[vector.task]
            total += vector.value if weight == 1 else vector.value.mul_(weight)
        return total


class Whole:
    """All task vectors of one merge.

    Args:
        sources: one lazy mapping per task, from names to tensors made anew at each access.
        weights: one per task.
        shapes: of every name that any of them touches.
        order: in which tasks are visited; by default as given.
        labels: what to call each in a message.
        aside: names that don't count when a share of a whole task vector is taken.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        order: Sequence[int] = (),
        labels: Sequence[str] = (),
        aside: frozenset[str] = frozenset(),
    ) -> None:
        self.sources, self.weights, self.shapes = tuple(sources), tuple(weights), shapes
        self.names = [frozenset(s) for s in sources]
        self.order = tuple(order) or tuple(range(len(sources)))
        self._labels = tuple(labels) or tuple(f"task vector {i + 1}" for i in range(len(sources)))
        self._aside = aside
        self._floors: dict[tuple[int, float], float] = {}

    def at(self, name: str) -> Vectors:
        """One tensor of every task vector."""
        return Vectors(name, self.shapes[name], self.weights, self)

    def read(self, task: int, name: str) -> Tensor:
        """Compute one tensor of one task vector, in float32.

        Raises:
            Corrupt: it holds NaN or infinity.
        """
        value = self.sources[task][name].to(torch.float32)
        if value.numel() and not all(bool(x.isfinite()) for x in value.aminmax()):
            raise Corrupt(
                f"{self._labels[task]}: NaN or infinity in {name}", "leave it out, or train it again with a lower --lr"
            )
        return value

    def floor(self, task: int, density: float) -> float:
        """`floor` of a whole task vector, found at the first call."""
        if (task, density) not in self._floors:
            names = sorted(self.names[task] - self._aside)
            self._floors[task, density] = floor(lambda: (self.read(task, n) for n in names), density)
        return self._floors[task, density]

    def report(self) -> tuple[list[float], dict[tuple[int, int], float | None]]:
        """Compare the task vectors, in one pass.

        Returns:
            The L2 norm of each, and for each pair (i, j), i < j, the share of the entries moved by both that both move
            the same way; None where no entry is moved by both.
        """
        count = len(self.sources)
        squares, same, both = [0.0] * count, _square(count), _square(count)
        for name in sorted(self.shapes):
            tasks = [t for t in range(count) if name in self.names[t]]
            signs: list[Tensor] = []
            for task in tasks:
                value = self.read(task, name).reshape(-1)
                squares[task] += float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
                signs.append(value.sign_().to(torch.int8))
            place = torch.tensor(tasks)
            for chunk in torch.stack(signs).split(_CHUNK, dim=1):
                sign = chunk.to(torch.float32)
                moved = (sign.abs() @ sign.abs().T).double()
                both[place[:, None], place] += moved
                same[place[:, None], place] += (moved + (sign @ sign.T).double()) / 2
        shares = {
            (i, j): float(same[i, j] / both[i, j]) if both[i, j] else None for i, j in combinations(range(count), 2)
        }
        return [math.sqrt(s) for s in squares], shares


def floor(scan: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Find the magnitude from which on the largest `density` of all entries lie: exactly, in constant memory.

    Bit patterns of non-negative float32 order like their values, so two passes of counting find the k-th largest: by
    the upper 16 bits, then by the lower ones inside the bin where it lies. Zeros (and magnitudes below 1e-40) don't
    count, so that a task vector has one floor whether or not untouched tensors are stored with it.

    Args:
        scan: gives the float32 entries piece by piece; called once per pass.
        density: the share to keep, at least one entry. Entries equal to the floor are all kept.

    Returns:
        The floor; 0 when everything is kept.
    """
    if density >= 1:
        return 0.0
    upper = _count(scan, lambda key: key >> _HALF)
    total = int(upper[1:].sum())
    if not total:
        return 0.0
    high, rank = _from_top(upper, max(1, round(density * total)))
    low, _ = _from_top(_count(scan, lambda key: key[key >> _HALF == high] & (_BINS - 1)), rank)
    return float(torch.tensor(high << _HALF | low, dtype=torch.int32).view(torch.float32))


def _count(scan: Callable[[], Iterable[Tensor]], digit: Callable[[Tensor], Tensor]) -> Tensor:
    """Histogram of one digit of all magnitudes, in pieces that fit a cache."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for value in scan():
        for piece in value.reshape(-1).split(_CHUNK):
            counts += torch.bincount(digit(piece.view(torch.int32) & _MAGNITUDE), minlength=_BINS)
    return counts


def _from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest entry, and its rank inside."""
    reached = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(reached, rank))
    place = len(counts) - 1 - index
    return place, rank - int(reached[index] - counts[place])


def _square(count: int) -> Tensor:
    return torch.zeros(count, count, dtype=torch.float64)

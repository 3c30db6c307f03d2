"""The magnitude above which a share of all entries lies: exactly, without sorting, in a sample and a pass.

A thin sample tells between which two magnitudes the floor lies, almost surely and within a percent of the entries; a pass
counts what is above, and keeps what is between. Should it lie elsewhere, a pass with wider bounds follows (Floyd and Rivest
1975, doi:10.1145/360680.360691). Kept is a hundredth of the entries or so. numpy compares and counts several times as fast
as torch in one thread.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vtzoo.tensors import WORKERS, ahead

PIECE = 1 << 16
"""So many entries are worked on at once: a few arrays of this length fit a core's cache."""
_EVERY = 251  # one of so many entries is in the sample; a prime, since what repeats along a tensor has other periods
_SURE = 5.0  # standard deviations
_MANY = 8  # where more than an eighth of a piece lies between bounds that a hundredth should
_TINY = np.float32(1e-45)  # the least above zero
Entry = tuple[int, Callable[[], Tensor]]
Scan = Callable[[], Iterable[Entry]]
Bounds = tuple[float, float]


def floor(value: Tensor, density: float) -> float:
    """The floor of one tensor: see `floors`."""
    return floors(lambda: [(0, lambda: value)], 1, density)[0]


def floors(scan: Scan, count: int, density: float, sample: Scan | None = None) -> list[float]:
    """Find, for each of several vectors, the magnitude from which on its largest `density` of all entries lie.

    Zeros don't count, so that a task vector has one floor whether or not untouched tensors are stored with it.

    Args:
        scan: gives what makes the float32 entries piece by piece, each with the number of its vector; called once per pass.
        count: how many vectors.
        density: the share to keep, at least one entry. Entries equal to the floor are all kept.
        sample: the same for some of the entries, of all places alike; by default every 251st is taken in a pass of its own.

    Returns:
        The floors; 0 where everything is kept.
    """
    if density >= 1:
        return [0.0] * count
    samples = _sampled(sample, count, 1, 1) if sample else _sampled(scan, count, _EVERY, WORKERS)
    found = [0.0] * count
    left, width = set(range(count)), _SURE
    while left:
        bounds = {i: _bounds(samples[i], density, width) for i in left}
        for i, seen in _between(scan, bounds).items():
            if (value := seen.ranked(bounds[i], density)) is not None:
                found[i] = value
                left.remove(i)
        width *= 8
    return found


def _sampled(scan: Scan, count: int, every: int, workers: int) -> list[NDArray[np.float32]]:
    """Of each vector some magnitudes above zero, the least first; two workers would only wait for each other where all is read fast."""
    parts = [[np.zeros(0, np.float32)] for _ in range(count)]

    def one(entry: Entry) -> NDArray[np.float32]:
        some = np.abs(entry[1]().reshape(-1).numpy()[::every])
        return some[some > 0]

    entries = list(scan())
    for (i, _), some in zip(entries, ahead(one, entries, min(workers, len(entries))), strict=True):
        parts[i].append(some)
    return [np.sort(np.concatenate(p)) for p in parts]


def _bounds(sample: NDArray[np.float32], share: float, width: float) -> Bounds:
    """Magnitudes between which the floor lies, unless the sample misleads by `width` deviations."""
    middle, spread = len(sample) * share, 1 + width * math.sqrt(len(sample) * share * (1 - share))
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    low = float(sample[-1 - last]) if last < len(sample) else 0.0
    return low, float(sample[-1 - first]) if first >= 0 else math.inf


@dataclass(eq=False)
class _Seen:
    """What a pass saw of one vector.

    Attributes:
        total: entries that aren't zero.
        above: entries above the upper bound.
        ties: entries equal to the upper and to the lower bound that `inside` lacks, where many are.
        inside: magnitudes (float32) from the lower bound to the upper, in one piece: many small ones would lie between those
            that are freed, and keep memory from being used again.
    """

    total: int = 0
    above: int = 0
    ties: list[int] = field(default_factory=lambda: [0, 0])
    inside: bytearray = field(default_factory=bytearray)

    def add(self, other: "_Seen") -> None:
        """And what was seen elsewhere."""
        self.total += other.total
        self.above += other.above
        self.ties = [a + b for a, b in zip(self.ties, other.ties, strict=True)]
        self.inside += other.inside

    def ranked(self, bounds: Bounds, density: float) -> float | None:
        """The floor; None where it lies beyond the bounds."""
        low, high = bounds
        if not self.total:
            return 0.0
        rank = max(1, round(density * self.total)) - self.above
        if rank <= 0:
            return None
        if rank <= self.ties[0]:
            return high
        rank -= self.ties[0]
        found: NDArray[np.float32] = np.frombuffer(self.inside, np.float32)
        if rank <= len(found):
            return float(np.partition(found, len(found) - rank)[len(found) - rank])
        return low if low and rank <= len(found) + self.ties[1] else None


def _between(scan: Scan, bounds: Mapping[int, Bounds]) -> dict[int, _Seen]:
    """Of each vector what is above its bounds, and between them."""
    found = {i: _Seen() for i in bounds}

    def one(entry: Entry) -> _Seen:
        seen, values = _Seen(), entry[1]().reshape(-1).numpy()
        low, high = (np.float32(b) for b in bounds[entry[0]])
        room, flags, more = np.empty(PIECE, np.float32), np.empty(PIECE, bool), np.empty(PIECE, bool)
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            size, flag, other = room[: len(piece)], flags[: len(piece)], more[: len(piece)]  # only the last is shorter
            np.abs(piece, out=size)
            seen.total += int(np.count_nonzero(np.not_equal(piece, 0, out=flag)))
            above = int(np.count_nonzero(np.greater(size, high, out=flag)))
            np.greater_equal(size, low or _TINY, out=other)
            seen.above += above
            np.not_equal(flag, other, out=other)  # what is above the upper is above the lower, too
            inside = int(np.count_nonzero(other))
            if inside > len(piece) // _MANY:  # ties are counted, or they would all be kept
                seen.ties = [
                    seen.ties[0] + int((size == high).sum()),
                    seen.ties[1] + int((size == low).sum() if low else 0),
                ]
                np.logical_and(other, (size != high) & (size != low), out=other)
            if inside:
                seen.inside += size.compress(other).data
        return seen

    entries = [e for e in scan() if e[0] in bounds]
    for (i, _), own in zip(entries, ahead(one, entries, min(WORKERS, len(entries))), strict=True):
        found[i].add(own)
    return found

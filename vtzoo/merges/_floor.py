"""The magnitude above which a share of all entries lies: exactly, without sorting, in constant memory.

Bit patterns of non-negative float32 order like their values, so two passes of counting find the k-th largest: by the
upper 16 bits, then by the lower ones inside the bin where it lies.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vtzoo.tensors import WORKERS, ahead

CHUNK = 1 << 18
_HALF = 16
_BINS = 1 << _HALF
_MAGNITUDE = 0x7FFFFFFF
Entry = tuple[int, Callable[[], Tensor]]
Scan = Callable[[], Iterable[Entry]]


def floor(value: Tensor, density: float) -> float:
    """The floor of one tensor: see `floors`."""
    return floors(lambda: [(0, lambda: value)], 1, density)[0]


def floors(scan: Scan, count: int, density: float) -> list[float]:
    """Find, for each of several vectors, the magnitude from which on its largest `density` of all entries lie.

    Zeros (and magnitudes below 1e-40) don't count, so that a task vector has one floor whether or not untouched tensors
    are stored with it.

    Args:
        scan: gives what makes the float32 entries piece by piece, each with the number of its vector; called once per pass.
        count: how many vectors.
        density: the share to keep, at least one entry. Entries equal to the floor are all kept.

    Returns:
        The floors; 0 where everything is kept.
    """
    if density >= 1:
        return [0.0] * count
    counts = _count(scan, count, lambda key, _: key >> _HALF)
    total = [int(c[1:].sum()) for c in counts]
    found = [_from_top(c, max(1, round(density * n))) if n else (0, 1) for c, n in zip(counts, total, strict=True)]
    del counts  # half a MiB for each
    lower = _count(scan, count, lambda key, i: key[key >> _HALF == found[i][0]] & (_BINS - 1))
    bits = [high << _HALF | _from_top(c, rank)[0] for c, (high, rank) in zip(lower, found, strict=True)]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return [value if n else 0.0 for value, n in zip(values, total, strict=True)]


def _count(scan: Scan, count: int, digit: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Histograms of one digit of all magnitudes, one a vector, in pieces that fit a cache."""
    counts, entries = torch.zeros(count, _BINS, dtype=torch.int64), list(scan())

    def one(entry: Entry) -> Tensor:
        found = torch.zeros(_BINS, dtype=torch.int64)
        for piece in entry[1]().reshape(-1).split(CHUNK):
            found += torch.bincount(digit(piece.view(torch.int32) & _MAGNITUDE, entry[0]), minlength=_BINS)
        return found

    for (i, _), found in zip(entries, ahead(one, entries, min(WORKERS, len(entries))), strict=True):
        counts[i] += found
    return counts


def _from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest entry, and its rank inside."""
    reached = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(reached, rank))
    place = len(counts) - 1 - index
    return place, rank - int(reached[index] - counts[place])

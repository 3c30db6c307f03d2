"""The magnitude above which a share of all entries lies: exactly, without sorting, in two passes.

A thin sample tells between which two magnitudes the floor lies, almost surely and within a percent of the entries; a pass
counts what is above, and keeps what is between. Should it lie elsewhere, a pass with wider bounds follows (Floyd and Rivest
1975, doi:10.1145/360680.360691). Kept is a hundredth of the entries or so. numpy compares and counts several times as fast
as torch in one thread.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from vtzoo.tensors import WORKERS, ahead

PIECE = 1 << 15
"""So many entries are worked on at once: a few arrays of this length fit a core's cache."""
_EVERY = 251  # one of so many entries is in the sample; a prime, since what repeats along a tensor has other periods
_SURE = 5.0  # standard deviations
Entry = tuple[int, Callable[[], Tensor]]
Scan = Callable[[], Iterable[Entry]]
Bounds = tuple[float, float]


def floor(value: Tensor, density: float) -> float:
    """The floor of one tensor: see `floors`."""
    return floors(lambda: [(0, lambda: value)], 1, density)[0]


def floors(scan: Scan, count: int, density: float) -> list[float]:
    """Find, for each of several vectors, the magnitude from which on its largest `density` of all entries lie.

    Zeros don't count, so that a task vector has one floor whether or not untouched tensors are stored with it.

    Args:
        scan: gives what makes the float32 entries piece by piece, each with the number of its vector; called once per pass.
        count: how many vectors.
        density: the share to keep, at least one entry. Entries equal to the floor are all kept.

    Returns:
        The floors; 0 where everything is kept.
    """
    if density >= 1:
        return [0.0] * count
    samples, found = _sampled(scan, count), [0.0] * count
    left, width = {i for i, (_, total) in enumerate(samples) if total}, _SURE
    ranks = [max(1, round(density * total)) for _, total in samples]
    while left:
        bounds = {i: _bounds(*samples[i], ranks[i], width) for i in left}
        for i, (counts, inside) in _between(scan, bounds).items():
            if (value := _ranked(bounds[i], counts, inside, ranks[i])) is not None:
                found[i] = value
                left.remove(i)
        width *= 8
    return found


def _sampled(scan: Scan, count: int) -> list[tuple[Tensor, int]]:
    """Of each vector some magnitudes, the largest first, and how many entries aren't zero."""
    parts, totals = [[torch.zeros(0)] for _ in range(count)], [0] * count

    def one(entry: Entry) -> tuple[Tensor, int]:
        flat = entry[1]().reshape(-1)
        sample = flat[::_EVERY].abs()
        return sample[sample > 0], int(np.count_nonzero(flat.numpy() != 0))

    entries = list(scan())
    for (i, _), (sample, total) in zip(entries, ahead(one, entries, min(WORKERS, len(entries))), strict=True):
        parts[i].append(sample)
        totals[i] += total
    return [(torch.cat(p).sort(descending=True).values, n) for p, n in zip(parts, totals, strict=True)]


def _bounds(sample: Tensor, total: int, rank: int, width: float) -> Bounds:
    """Magnitudes between which the rank-th largest of `total` entries lies, unless the sample misleads by `width` deviations."""
    share = rank / total
    middle, spread = len(sample) * share, 1 + width * math.sqrt(len(sample) * share * (1 - share))
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    low = float(sample[last]) if last < len(sample) else 0.0
    return low, float(sample[first]) if first >= 0 else math.inf


def _between(scan: Scan, bounds: Mapping[int, Bounds]) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each vector how many entries are above the bounds, equal the upper, and equal the lower; and those between."""
    counts = {i: torch.zeros(3, dtype=torch.int64) for i in bounds}
    inside = {i: [torch.zeros(0)] for i in bounds}

    def one(entry: Entry) -> tuple[list[int], Tensor]:
        (low, high), values = bounds[entry[0]], entry[1]().reshape(-1).numpy()
        own, kept, size, flags = (
            [0, 0, 0],
            [np.zeros(0, np.float32)],
            np.empty(PIECE, np.float32),
            np.empty(PIECE, bool),
        )
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            size, flags = size[: len(piece)], flags[: len(piece)]  # only the last is shorter
            np.abs(piece, out=size)
            for k, (which, bound) in enumerate(((np.greater, high), (np.equal, high), (np.equal, low))):
                own[k] += int(np.count_nonzero(which(size, bound, out=flags)))
            kept.append(size[np.greater(size, low, out=flags) & (size < high)])
        return own, torch.from_numpy(np.concatenate(kept))

    entries = [e for e in scan() if e[0] in bounds]
    for (i, _), (own, kept) in zip(entries, ahead(one, entries, min(WORKERS, len(entries))), strict=True):
        counts[i] += torch.tensor(own)
        inside[i].append(kept)
    return {i: (counts[i], torch.cat(inside[i])) for i in bounds}


def _ranked(bounds: Bounds, counts: Tensor, inside: Tensor, rank: int) -> float | None:
    """The rank-th largest magnitude; None where it lies beyond the bounds."""
    (low, high), (above, at_high, at_low) = bounds, counts.tolist()
    rank -= above
    if rank <= 0:
        return None
    if rank <= at_high:
        return high
    rank -= at_high
    if rank <= len(inside):
        return float(inside.kthvalue(len(inside) - rank + 1).values)
    return low if low and rank <= len(inside) + at_low else None

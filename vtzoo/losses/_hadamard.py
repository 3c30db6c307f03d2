"""Rotations after which every dimension has the same variance.

A Hadamard matrix (entries +-1, orthogonal rows) does it whatever the variances are. Sizes that are a power of two times
1, q + 1 (q a prime, 3 modulo 4) or 2 (q + 1) (q a prime, 1 modulo 4) are made by doubling (Sylvester) from Paley's two constructions;
for other sizes rotations in planes, one a dimension, do it for the variances at hand.
"""

import torch
from torch import Tensor


def levelling(variances: Tensor) -> Tensor:
    """A rotation R with a constant diagonal of R diag(v) R'; v [width] -> [width, width], float64."""
    whole = hadamard(len(variances))
    return _by_planes(variances) if whole is None else whole / len(variances) ** 0.5


def hadamard(size: int) -> Tensor | None:
    """[size, size] of +-1, float64; None where neither construction reaches."""
    for doublings in reversed(range(size.bit_length())):
        if size % 2**doublings == 0 and (found := _paley(size >> doublings)) is not None:
            for _ in range(doublings):
                found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=found.dtype), found)
            return found
    return None


def _paley(size: int) -> Tensor | None:
    """Of a size that is 1 or not to be halved further."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    if _prime(size - 1):  # 3 modulo 4
        return torch.eye(size, dtype=torch.float64) + _bordered(size - 1, -1)
    if _prime(size // 2 - 1):  # 1 modulo 4: one that is 3 modulo 4 has served for half the size
        on, off = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        eye = torch.eye(size // 2, dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1, 1), on) + torch.kron(eye, off)
    return None


def _bordered(prime: int, left: int) -> Tensor:
    """Which differences of indices are squares modulo a prime (1, -1, and 0 for 0), behind a row of 1 and a column of `left`."""
    steps = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[steps**2 % prime] = 1
    character[0] = 0
    found = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 0], found[0, 0] = left, 0
    found[1:, 1:] = character[(steps[:, None] - steps) % prime]
    return found


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _by_planes(variances: Tensor) -> Tensor:
    """Turn the smallest variance against the largest until it is the mean, and leave it there; then the next."""
    left, mean = variances.double().clone(), variances.double().mean()
    rotation, open_ = torch.eye(len(left), dtype=torch.float64), torch.ones(len(left), dtype=torch.bool)
    for _ in range(len(left) - 1):
        low = int(left.where(open_, torch.inf).argmin())
        high = int(left.where(open_, -torch.inf).argmax())
        if left[high] <= left[low]:
            break
        part = ((mean - left[low]) / (left[high] - left[low])).clamp(0, 1)
        turn = torch.stack([(1 - part).sqrt(), part.sqrt(), -part.sqrt(), (1 - part).sqrt()]).view(2, 2)
        rotation[[low, high]] = turn @ rotation[[low, high]]
        left[high] += left[low] - mean
        open_[low] = False
    return rotation

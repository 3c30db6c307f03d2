"""Random numbers that depend on what they are for alone: not on threads, the order of the tasks, or the process."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1) for one tensor of one task, by a counter-based generator (Philox) keyed by seed and key."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    draw = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
    return torch.from_numpy(draw.random(shape, dtype=np.float32))

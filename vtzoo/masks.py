"""A merge with a mask for each task: one network for all is stored, and of every entry a bit for each task whether it counts.

`@mask/<tensor>` [tasks, ceil(entries / 8)] holds the bits, eight to a byte, the first entry in the highest; `@scale` [tasks] what a task's own
network multiplies the difference with:   W_t = W0 + scale_t * mask_t * (W - W0)
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.tensors import Lazy, dtype_of, shape_of, working

MASK, SCALE = "@mask/", "@scale"


def packed(bits: Tensor) -> Tensor:
    """A tensor's bits as bytes [ceil(entries / 8)]."""
    return torch.from_numpy(np.packbits(bits.reshape(-1).numpy()))


def unpacked(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One task's bytes as bits in a tensor's shape."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(row.numpy(), count=count)).bool().reshape(shape)


def is_masked(delta: Delta) -> bool:
    """Whether each task has a network of its own."""
    return SCALE in delta.tensors


def of_task(delta: Delta, base: Mapping[str, Tensor], task: str | None) -> Delta:
    """The delta of one task alone, lazily; any other delta as it is.

    Args:
        delta: made for this backbone.
        base: its tensors at the delta's input size.
        task: whose; may be left out where there is one.

    Raises:
        UsageError: no task is meant.
        NotFound: no such task.
    """
    if not is_masked(delta):
        return delta
    if task == "":
        names = ", ".join(t.name for t in delta.tasks)
        raise UsageError(
            f"{delta.method} keeps a network of its own for each task", f"choose one with its head: {names}"
        )
    chosen = delta.task(task)
    row, own = delta.tasks.index(chosen), delta.tensors
    scale = cache(lambda: float(own[SCALE][row]))  # of a merge that isn't written yet this is a pass over all tensors

    def make(place: str, name: str) -> Tensor:
        stored, before = own[place], base[name]
        kind = working(stored, before)
        bits = unpacked(own[f"{MASK}{name}"][row], tuple(stored.shape))
        step = (stored.to(kind) - before.to(kind)).mul_(bits).mul_(scale())
        return step.add_(before.to(kind)).to(stored.dtype)

    places = {
        f"{s.key(p.graft)}.{n}": s.key(n) for p in delta.parts for s in p.sites for n in s.facts.get("params", {})
    }
    makers = {n: (lambda n=n: own[n]) for n in own if not n.startswith((MASK, SCALE))}
    masked = {p: (lambda p=p, n=n: make(p, n)) for p, n in places.items() if f"{MASK}{n}" in own}
    names = [*makers]
    tensors = Lazy(makers | masked, {n: shape_of(own, n) for n in names}, {n: dtype_of(own, n) for n in names})
    return replace(delta, tensors=tensors, tasks=(chosen,))

"""PCB: entries compete, within their task by size and among the tasks by agreement (Du et al. 2024, arXiv:2410.02396, sec. 3.2).

    n_t = |D_t| / its largest, to the power of two        what an entry is within its task; the largest 1e-4 of a task count as one
    b_t = exp(T (n_t - 1)) * tanh(D_t * sum_i D_i)              and beside the other tasks
    s_t = (b_t - f_t) / (max b_t - f_t) where b_t is among the largest `density` of task t, whose last is f_t; else 0
    D   = scale * sum_t s_t D_t / sum_t s_t               W = W0 + D

Symmetric: yes.  Neutral: one delta with density 1 and scale 1 comes back, but for its largest 1e-4, which are cut.
Departs from the paper: an entry that opposes the sum is never kept (the authors keep it where fewer than `density` agree, with
next to no say); the smallest magnitude of a task is taken as 0; where all that is kept scores alike it is averaged; the scale,
which they search, is 1.2, the middle of their range; a weight multiplies its task vector.
"""

from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._whole import Vectors, Whole
from vtzoo.tensors import WORKERS

PAPER = "arXiv:2410.02396"
SYMMETRIC = True
LOW_RANK = False
NEUTRAL = False
_OUTLIERS, _LEAST, _TOP = 1e-4, 1e-37, 1e-30
"""The share of a task that is cut, what an entry that opposes the sum scores, and a share that is one entry of any task."""


def pcb(
    vectors: Vectors,
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.1,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.2,
) -> Tensor:
    """Score, cut, average.

    Args:
        vectors: of one tensor.
        density: share of a task's entries that is kept.
        scale: factor on the mean.
    """
    whole = vectors.whole
    scores = whole.once("pcb", lambda: _scores(whole))
    pull, mass = torch.zeros(2, *vectors.shape)
    for vector in vectors:
        last, first = (scores.floor(vector.task, d) for d in (density, _TOP))
        own = scores.read(vector.task, vectors.name)
        say = ((own - last) / (first - last)).clamp_(min=0) if first > last else (own >= last).float()
        say = say.masked_fill_(own <= _LEAST, 0.0)
        pull += _cut(whole, vector.task, vector.value).mul_(vector.weight).mul_(say)
        mass += say
    return torch.where(mass > 0, pull / mass, 0.0).mul_(scale)


def _cut(whole: Whole, task: int, value: Tensor) -> Tensor:
    most = whole.floor(task, _OUTLIERS)
    return value.clamp_(-most, most)


def _scores(whole: Whole) -> Whole:
    """What each entry of each task scores: a view whose floors are the tasks' own."""
    count = sum(bool(w) for w in whole.weights)

    @lru_cache(maxsize=WORKERS + 1)
    def total(name: str) -> Tensor:
        return whole.at(name).sum()

    def score(task: int, name: str) -> Tensor:
        own = whole.read(task, name)
        own = _cut(whole, task, own)
        beside = torch.tanh(total(name) * own * whole.weights[task])
        size = own.abs().div_(whole.floor(task, _OUTLIERS) or 1.0)
        return size.square_().sub_(1).mul_(count).exp_().mul_(beside).clamp_(min=_LEAST).masked_fill_(own == 0, 0.0)

    return whole.read_as(score, together=True)

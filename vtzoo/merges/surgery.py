"""Surgery: a small module for each task that takes the merge's bias out of its features (Yang et al. 2024, arXiv:2402.02705, sec. 4).

    z  <-  z - U relu(D z)                                          z: features of the merged network
    minimise over U, D   mean_x |z - U relu(D z) - z_t|_1           z_t: those of task t's own network; x: images of task t, without labels

What was merged stays as it is: after any merge into one network, `ties+surgery`; `surgery` alone comes after task arithmetic. Only heads change: the
task's classifier W, b behind the module is one head, W z + b - (W U) relu(D z), of the method `mlp-head[skip=true]`.
Symmetric: yes.  Neutral: one delta comes back, if the merge gives it back.
Departs from the paper: images of the train split, where the paper takes those that it is measured on; both networks' features
are computed once, since nothing in front of the module changes.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

PAPER = "arXiv:2402.02705"
SYMMETRIC = True
LOW_RANK = True
STAGE = "heads"
NEEDS = "images"


def surgery(
    features: Tensor,
    wanted: Tensor,
    *,
    rank: Annotated[int, Field(ge=1)] = 16,
    steps: Annotated[int, Field(ge=1)] = 1000,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3,
    batch: Annotated[int, Field(ge=1)] = 16,
) -> tuple[Tensor, Tensor]:
    """Fit the module to one task's images, by Adam from U = 0.

    Args:
        features: of the merged network, [n, features].
        wanted: of the task's own network on the same images.
        rank: width of the module.
        steps: of Adam.
        lr: of Adam.
        batch: images a step; each is drawn once before any is drawn again.

    Returns:
        D [rank, features] and U [features, rank].
    """
    draw = torch.Generator().manual_seed(0)
    width = features.shape[1]
    down = torch.empty(rank, width).uniform_(-1, 1, generator=draw).div_(math.sqrt(width))  # as nn.Linear begins
    up = torch.zeros(width, rank)
    module = [nn.Parameter(down), nn.Parameter(up)]
    adam, left = torch.optim.Adam(module, lr=lr), torch.zeros(0, dtype=torch.long)
    with torch.enable_grad():
        for _ in range(steps):
            if not len(left):
                left = torch.randperm(len(features), generator=draw)
            rows, left = left[:batch], left[batch:]
            bias = (features[rows] @ module[0].T).relu() @ module[1].T
            loss = (features[rows] - bias - wanted[rows]).abs().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return module[0].detach(), module[1].detach()

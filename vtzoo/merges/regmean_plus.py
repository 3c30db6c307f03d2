"""RegMean++: RegMean with the inputs that a matrix gets in the merged network (Nguyen et al. 2025, arXiv:2508.03121).

    G_t = X_t' X_t                          X_t: what reaches the matrix in the network merged so far, on task t's images
    D   = (sum_t w_t D_t G_t) (sum_t w_t G_t)^-1                                     layer after layer, from the input on

Everything else is as in RegMean, which takes X_t from task t's own network. All tasks' images go through the network at once, and
each matrix is merged when it is met: one pass.
Symmetric: yes.  Neutral: one delta comes back.
Departs from the paper: kernels are matrices too; a ridge; weights are positive; fewer images of each task (64) are taken, since they
go through together.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.evidence import Products
from vtzoo.merges._regression import check, solved
from vtzoo.merges._scene import Scene
from vtzoo.merges._whole import Vectors

__all__ = ["check", "look", "regmean_plus"]
PAPER = "arXiv:2508.03121"
SYMMETRIC = True
LOW_RANK = True
NEEDS = "images"
IMAGES = 64


def regmean_plus(
    vectors: Vectors,
    *,
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.95,
    ridge: Annotated[float, Field(gt=0, le=1)] = 1e-3,
) -> Tensor:
    """Solve the regression.

    Args:
        vectors: of one tensor.
        shrink: factor on what different inputs have in common.
        ridge: added to every input's energy, as a share of their mean.
    """
    return solved(vectors, shrink, ridge)


@torch.no_grad()
def look(scene: Scene, **_: float) -> None:
    """Go through the network once, merging each matrix before it is used."""
    scene.load()  # what is no matrix is merged already, and needs no inputs
    count = min(len(x) for x in scene.images)
    named = dict(scene.model.named_parameters())

    def meet(name: str, rows: Tensor) -> None:
        if name not in scene.whole.shapes or any(name in own for own in scene.told) or len(rows) % len(scene.images):
            return
        for own, part in zip(scene.told, rows.chunk(len(scene.images)), strict=True):
            flat = part.reshape(-1, part.shape[-1]).float()
            own[name] = (flat.mT @ flat).div_(count).cpu()
        named[name].copy_(scene.tensor(name))

    with Products({id(p): n for n, p in named.items()}, meet):
        scene.model(torch.cat([x[:count] for x in scene.images]).to(scene.device))

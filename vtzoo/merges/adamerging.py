"""AdaMerging: the coefficients that make the merged network sure of its answers (Yang et al. 2023, arXiv:2310.02575, sec. 3.2).

    minimise over c   sum_t mean_x H(softmax(head_t(f(x; W0 + sum_i c_i D_i))))      x: images of task t, without labels
    D = sum_i c_i D_i                                                               c_i one number a task, or one a task and tensor

By Adam from c = `start`, each c kept within 0 and 1, a batch of every task in each step. No image of a test split should be among
those given: the paper adapts to the very images that it is measured on, here the train split's are taken.
Symmetric: yes.  Neutral: no: the coefficients of one delta are found, too.
Departs from the paper: the coefficients' gradient is taken from that of the merged weights, <dL/dW, D_i>, which is the same and
needs no graph through the sum; a weight multiplies its task vector. All task vectors are held in memory while it looks.
"""

from collections.abc import Container, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from vtzoo.merges._scene import Scene
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2310.02575"
SYMMETRIC = True
LOW_RANK = True
PIECEWISE: Mapping[str, str] = {}
NEUTRAL = False
NEEDS = "images"
HEADS = True

Fraction = Annotated[float, Field(ge=0, le=1)]


def adamerging(
    vectors: Vectors,
    *,
    by: Literal["task", "layer"] = "layer",  # noqa: ARG001 - `look` has used them
    steps: Annotated[int, Field(ge=1)] = 500,  # noqa: ARG001
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3,  # noqa: ARG001
    start: Fraction = 0.3,
    batch: Annotated[int, Field(ge=1)] = 16,  # noqa: ARG001
) -> Tensor:
    """Add up with the coefficients that were found.

    Args:
        vectors: of one tensor.
        by: one coefficient a task, or one for each of its tensors.
        steps: of Adam.
        lr: of Adam.
        start: of every coefficient.
        batch: images of each task in a step.
    """
    weights = list(vectors.weights)
    for task, weight in enumerate(weights):
        found = vectors.evidence(task)
        weights[task] = weight * (start if found is None else float(found))
    return vectors.sum(weights)


def look(scene: Scene, *, by: str, steps: int, lr: float, start: float, batch: int) -> None:
    """Find the coefficients."""
    scene.load()
    whole, model = scene.whole, scene.model
    names = [n for n, _ in model.named_parameters() if n in whole.shapes]
    base = {n: whole.ground[n].float().to(scene.device) for n in names}
    order = scene.tasks
    rows = [_row(scene, t, base) for t in order]
    coefs = torch.full((len(rows), len(names) if by == "layer" else 1), start)
    adam = torch.optim.Adam([coefs], lr=lr)
    for step in range(steps):
        weights = {n: _sum(base[n], n, rows, coefs[:, i if by == "layer" else 0]) for i, n in enumerate(names)}
        slopes = dict(zip(names, _slopes(scene, weights, step, batch), strict=True))
        pulls = torch.stack([torch.stack([_dot(slopes[n], r.get(n)) for n in names]) for r in rows])
        coefs.grad = pulls if by == "layer" else pulls.sum(1, keepdim=True)
        adam.step()
        coefs.clamp_(0, 1)
    for task, own in zip(order, coefs, strict=True):
        scene.told[task] |= {n: own[i if by == "layer" else 0] for i, n in enumerate(names)}


def _row(scene: Scene, task: int, names: Container[str]) -> dict[str, Tensor]:
    """One task vector, held in memory."""
    whole = scene.whole
    return {n: whole.read(task, n).mul_(whole.weights[task]).to(scene.device) for n in whole.names[task] if n in names}


def _sum(base: Tensor, name: str, rows: list[dict[str, Tensor]], coefs: Tensor) -> Tensor:
    total = base.clone()
    for row, coef in zip(rows, coefs.tolist(), strict=True):
        if name in row:
            total.add_(row[name], alpha=coef)
    return total.requires_grad_()


def _dot(slope: Tensor | None, vector: Tensor | None) -> Tensor:
    if slope is None or vector is None:
        return torch.zeros(())
    return torch.dot(slope.reshape(-1), vector.reshape(-1)).cpu()


def _slopes(scene: Scene, weights: dict[str, Tensor], step: int, batch: int) -> tuple[Tensor | None, ...]:
    """The gradient of the entropy, summed over the tasks, by the merged weights."""
    picked = [
        x[torch.arange(step * batch, (step + 1) * batch) % len(x)] for x in (scene.images[t] for t in scene.tasks)
    ]
    with torch.enable_grad():
        features = functional_call(scene.model, weights, (torch.cat(picked).to(scene.device),)).float()
        loss = torch.zeros((), device=scene.device)
        for task, own in zip(scene.tasks, features.split(batch), strict=True):
            logs = scene.logits(task, own).log_softmax(-1)
            loss = loss - (logs.exp() * logs).sum(-1).mean()
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

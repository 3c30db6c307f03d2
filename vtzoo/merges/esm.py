"""ESM: each task's strongest output directions, the strong made stronger (Li et al. 2026, arXiv:2602.20208, sec. 4).

    D_t X_t' = P_t S Q',  of which the first k = out / T directions P_t stay       X_t: inputs of the matrix, on task t's images
    V_t = P_t' D_t * (|D_t| / mean_i |D_i|)^2                                       between tasks
    V   = [V_1 .. V_T],   each column times (its length / their mean)^2            between inputs
    D   = U V,  both replaced by the nearest orthogonal matrix times the mean of their singular values
    D  <- scale * D * (|D| / its mean over matrices of the same kind)^2             between layers

Directions in which the outputs move matter, not those of the weights (TSV). Kinds are the tensors' names without their numbers.
Matrices are weights of linears and kernels of dense convolutions; the rest is averaged.
Symmetric: yes.  Neutral: no: scaling between inputs changes one delta, too.
Departs from the paper: kernels are matrices too; all matrices take part, where the authors' code leaves the attention's output
to TSV; T counts the tasks that touch the tensor; a weight multiplies its task vector.
"""

import re
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtzoo.merges._spectral import average, shaped, sides, span
from vtzoo.merges._spectral import svd as directions
from vtzoo.merges._whole import Vectors

PAPER = "arXiv:2602.20208"
SYMMETRIC = True
LOW_RANK = True
NEUTRAL = False
NEEDS = "images"
EVIDENCE = "grams"
IMAGES = 32


def esm(
    vectors: Vectors,
    *,
    power: Annotated[float, Field(ge=0, le=8)] = 2.0,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
) -> Tensor:
    """Project, scale, whiten.

    Args:
        vectors: of one tensor.
        power: of the three scalings; 0 leaves them out.
        scale: factor on the merged matrix.
    """
    if not _told(vectors):
        return average(vectors)
    merged = _joined(vectors, power)
    kind, whole = _kind(vectors.name), vectors.whole
    if power and merged.any():
        kin = [n for n in whole.shapes if _kind(n) == kind and _told(whole.at(n))]
        sizes = [whole.once(("esm", power, n), lambda n=n: float(_joined(whole.at(n), power).norm())) for n in kin]
        merged = merged * (float(merged.norm()) * len(sizes) / sum(sizes)) ** power
    return shaped(merged, vectors).mul_(scale)


def _told(vectors: Vectors) -> bool:
    """Whether it is a matrix whose inputs were seen on every task's images."""
    known = [vectors.evidence(t) is not None for t, w in enumerate(vectors.weights) if w]
    return vectors.is_matrix and all(known)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _joined(vectors: Vectors, power: float) -> Tensor:
    """The merged matrix before it is scaled beside its kin, in float64."""
    height, width = sides(vectors.shape)
    owners = [v.task for v in vectors if v.value.any()]
    if not owners:
        return torch.zeros(height, width, dtype=torch.float64)
    most, used, lengths = max(1, height // len(owners)), 0, list[float]()
    left, right = (
        torch.zeros(*s, dtype=torch.float64) for s in ((height, most * len(owners)), (most * len(owners), width))
    )
    for task in owners:
        factor, thin = vectors.whole.product(task, vectors.name)
        factor = vectors.weights[task] * factor.double().reshape(height, -1)
        own, seen = factor if thin is None else factor @ thin, vectors.evidence(task)
        assert seen is not None
        found = _strongest(factor, thin, seen.double(), most)
        lengths.append(float(own.norm()))
        place = slice(used, used := used + found.shape[1])
        left[:, place], right[place] = found, found.T @ own * lengths[-1] ** power
    left, right = left[:, :used], right[:used]
    right /= (sum(lengths) / len(lengths)) ** power
    columns = right.norm(dim=0)
    right *= (columns / columns.mean().clamp(min=1e-30)) ** power
    return _even(left) @ _even(right)


def _strongest(factor: Tensor, thin: Tensor | None, seen: Tensor, most: int) -> Tensor:
    """The first output directions [out, most] of a matrix, factor or factor @ thin, on inputs of the Gram matrix `seen`, by the smaller of two."""
    inner = seen if thin is None else thin @ seen @ thin.T
    if len(inner) > len(factor):
        return span(factor @ inner @ factor.T)[:, :most]
    squares, found = torch.linalg.eigh(inner)
    return directions(factor @ (found * squares.clamp(min=0).sqrt()), most)[0]


def _even(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, times the mean of the singular values."""
    left, values, right = directions(matrix)
    return values.mean() * (left @ right) if len(values) else matrix

"""How task vectors get in each other's way, tensor by tensor: what a merge's report draws.

Of each pair of tasks that move a tensor:

    cosine     <D_i, D_j> / (|D_i| |D_j|)
    conflict   the share of the entries moved by both that they move in opposite directions
    overlap    |U_i' U_j|^2 / k of the first k directions of each, matrices only: 1 where they are the same (Hotelling 1936,
               doi:10.1093/biomet/28.3-4.321: the mean squared cosine of principal angles); by chance k / their number

and of each task its norm and its effective rank, exp of the entropy of the shares of its squared singular values (Roy & Vetterli 2007).
"""

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from vtzoo.merges._spectral import sides
from vtzoo.merges._whole import Vectors, Whole, is_matrix
from vtzoo.tensors import WORKERS, ahead

DIRECTIONS = 8
"""How many directions of each task are compared."""


@torch.no_grad()
def interference(whole: Whole) -> list[dict[str, Any]]:
    """One record a tensor, in the order of depth and name: `tensor`, `depth`, `tasks` and `pairs`; reads every task vector once."""
    names = sorted(set(whole.shapes) - whole.aside, key=lambda n: (whole.depths.get(n, 0.0), _inside(n), n))
    return list(ahead(lambda n: _one(whole.at(n)), names, WORKERS))


def _inside(name: str) -> bool:
    """Whether a tensor is a block's: what lies before the first block comes before it."""
    return any(part.isdigit() for part in name.split("."))


def _one(vectors: Vectors) -> dict[str, Any]:
    values = {v.task: v.value for v in vectors}
    matrix = is_matrix(vectors.name, vectors.shape)
    spans = {t: _directions(v.reshape(sides(vectors.shape)).double()) for t, v in values.items()} if matrix else {}
    tasks = [
        {"task": t, "norm": float(v.double().norm()), "rank": _effective(spans[t][0]) if matrix else None}
        for t, v in sorted(values.items(), key=lambda item: item[0])
    ]
    pairs = [_pair(i, j, values, spans) for i, j in combinations(sorted(values), 2)]
    return {
        "tensor": vectors.name, "depth": vectors.whole.depths.get(vectors.name), "tasks": tasks,
        "pairs": pairs,
    }  # fmt: skip


def _pair(i: int, j: int, values: dict[int, Tensor], spans: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    a, b = values[i].double().reshape(-1), values[j].double().reshape(-1)
    both = (a != 0) & (b != 0)
    lengths = float(a.norm() * b.norm())
    overlap = None
    if spans and (count := min(spans[i][1].shape[1], spans[j][1].shape[1])):
        overlap = float((spans[i][1][:, :count].T @ spans[j][1][:, :count]).square().sum()) / count
    return {
        "a": i, "b": j, "cosine": float(a @ b) / lengths if lengths else None,
        "conflict": float((a.sign() != b.sign())[both].double().mean()) if both.any() else None, "overlap": overlap,
    }  # fmt: skip


def _directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All squared singular values, and the first directions on the shorter side [n, k]."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values, found = torch.linalg.eigh(gram)
    reached = int((values > 1e-10 * values[-1]).sum()) if values[-1] > 0 else 0
    return values.clamp(min=0), found.flip(1)[:, : min(DIRECTIONS, reached)]


def _effective(squares: Tensor) -> float:
    total = float(squares.sum())
    if not total:
        return 0.0
    shares = squares[squares > 1e-10 * squares[-1]] / total
    return math.exp(-float((shares * shares.log()).sum()))

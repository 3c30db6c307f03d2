"""What the merges that look at singular values share: which tensors are matrices, their SVD, and whitening.

A linear's weight is a matrix, and so is a convolution's kernel, as [out, in * kh * kw]; a grouped one too, since no shape tells
it from a dense one (its groups read other channels, so that their directions are mixed up). All else (norms, biases, tokens,
position tables, depthwise kernels) is no map between features: these are averaged, as the papers do with all that isn't a
linear's weight. Computed in float64. Directions whose singular value is below 1e-5 of the largest are what
rounding to float32 leaves where a task vector has low rank, and don't count.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vtzoo.merges._whole import Vectors

_ROUNDING = 1e-5
SVD = tuple[Tensor, Tensor, Tensor]


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's height and width as a matrix, [out, in * kh * kw]."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def products(vectors: Vectors, *, weighed: bool = True) -> Iterator[tuple[Tensor, Tensor | None]]:
    """As `matrices`, each as left [out, r] @ right [r, in] where a delta knows it so, as LoRA does; else right is None and left all of it.

    Args:
        vectors: of one tensor.
        weighed: multiplied by their weights.
    """
    for weight, left, right in vectors.products():
        own = left.double().flatten(1)
        if own.any():
            yield own * weight if weighed else own, right


def matrices(vectors: Vectors) -> Iterator[Tensor]:
    """weight * D_t [out, in] of every task that touches the tensor, one at a time; what is no matrix is one column."""
    for vector in vectors:
        value = vector.value.double().mul_(vector.weight).reshape(sides(vectors.shape))
        if value.any():
            yield value


def summed(vectors: Vectors) -> tuple[Tensor, int]:
    """The sum of `matrices`, and of how many."""
    total, count = torch.zeros(sides(vectors.shape), dtype=torch.float64), 0
    for matrix in matrices(vectors):
        total += matrix
        count += 1
    return total, count


def average(vectors: Vectors) -> Tensor:
    """The mean of weight * D_t over all tasks that take part."""
    return vectors.sum().div_(vectors.count)


def svd(matrix: Tensor, most: int | None = None, right: Tensor | None = None) -> SVD:
    """U [out, r], S [r], Vh [r, in] with S falling, of the directions that count; `most` keeps the first ones.

    With `right` [k, in] it is that of matrix [out, k] @ right, which is not made where it has twice as many rows and columns as k:
    by the SVD of R R' [k, k] of their QR decompositions.

    By the eigenvectors of the smaller Gram matrix, which takes a fraction of LAPACK's time; in float64 the squares still tell apart
    what lies above the rounding of float32.
    """
    if right is not None and 2 * right.shape[0] <= min(matrix.shape[0], right.shape[1]):
        (q, r), (p, s) = torch.linalg.qr(matrix), torch.linalg.qr(right.T)
        left, values, inner = torch.linalg.svd(r @ s.T)
        rank = _counting(values, most)
        return q @ left[:, :rank], values[:rank], inner[:rank] @ p.T
    matrix = matrix if right is None else matrix @ right
    tall = matrix.shape[0] > matrix.shape[1]
    squares, found = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    values = squares.flip(0).clamp_(min=0).sqrt_()
    rank = _counting(values, most)
    own, values = found.flip(1)[:, :rank], values[:rank].clone()
    other = (matrix @ own if tall else matrix.T @ own).div_(values)
    return (other, values, own.T) if tall else (own, values, other.T)


def _counting(values: Tensor, most: int | None) -> int:
    """How many falling singular values count."""
    rank = int((values > _ROUNDING * values[0]).sum())
    return rank if most is None else min(rank, most)


def orthogonal(matrix: Tensor) -> Tensor:
    """P Q' of its SVD P S Q', in the directions that count: the nearest matrix with orthonormal columns (or rows, if there are fewer)."""
    left, _, right = svd(matrix)
    return left @ right


def span(gram: Tensor) -> Tensor:
    """The directions [n, r] that a sum of D D' or D' D [n, n] reaches, the strongest first."""
    values, directions = torch.linalg.eigh(gram)
    reached = int((values > _ROUNDING**2 * values[-1]).sum())
    return directions.flip(1)[:, :reached]


class Span:
    """The directions that the columns of many matrices [n, k] reach; kept are the columns, or C C' [n, n] once they are more than n."""

    def __init__(self) -> None:
        self._columns: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, columns: Tensor) -> None:
        """And of these."""
        self._columns.append(columns)
        if self._gram is not None or sum(c.shape[1] for c in self._columns) >= len(columns):
            for own in self._columns:
                self._gram = own @ own.T if self._gram is None else self._gram.addmm_(own, own.T)
            self._columns = []

    def directions(self) -> Tensor:
        """[n, r], the strongest first; r is 0 where nothing came."""
        if self._gram is None:
            return svd(torch.cat(self._columns, 1))[0] if self._columns else torch.zeros(0, 0, dtype=torch.float64)
        return span(self._gram)


def shaped(matrix: Tensor, vectors: Vectors) -> Tensor:
    """A merged matrix in the tensor's own shape, in float32."""
    return matrix.to(torch.float32).reshape(vectors.shape)

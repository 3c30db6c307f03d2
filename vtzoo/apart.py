"""How far apart the tensors of two artifacts are, one tensor after the other.

Deltas of one backbone are compared by their task vectors a and b, whatever methods made them; where one has none by the tensors of
their files; models, and a delta with a model, by plain weights. Of each tensor:

    norm        |a|, |b|            difference  |a - b|, and its largest entry
    cosine      <a, b> / (|a| |b|)  distance    |a - b| / max(|a|, |b|): 0 where they are the same, 2 where opposite

A tensor that one side leaves as it is counts as zero there. Classifiers are compared where both have one of the task.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtzoo.artifact import Artifact, fold_artifact
from vtzoo.bases import open_base
from vtzoo.delta import HEAD, Delta
from vtzoo.errors import NotFoldable
from vtzoo.folding import grounded, task_vector
from vtzoo.merges._checks import complete
from vtzoo.speech import speaks
from vtzoo.tensors import WORKERS, Lazy, TensorFile, ahead, shape_of

Row = dict[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Tensors side by side.

    Attributes:
        by: "task vectors", "tensors of the files" or "weights"; "" where nothing could be compared.
        because: why not by something better.
        rows: one a tensor.
        only: the names that only one side has.
    """

    by: str = ""
    because: str = ""
    rows: list[Row] = field(default_factory=list[Row])
    only: tuple[list[str], list[str]] = field(default_factory=lambda: (list[str](), list[str]()))


def apart(a: Artifact, b: Artifact) -> Apart:
    """Compare two artifacts; reads each tensor once, and holds few at a time."""
    if why := _strangers(a, b):
        return Apart(because=why)
    try:
        by, because, left, right = _views(a, b)
    except NotFoldable as error:
        return Apart(because=error.message)
    names, only = _common(left, right, zeros=by == "task vectors")
    if not names:
        nothing = "no tensor of one has the name and shape of one of the other"
        return Apart(because=f"{because}; {nothing}" if because else nothing, only=only)
    with torch.no_grad():
        rows = list(ahead(lambda n: _row(n, left, right), names, WORKERS))
    return Apart(by=by, because=because, rows=rows, only=only)


def whole(rows: Iterable[Row]) -> Row:
    """The same of all tensors together, as one long vector; classifiers left out, which would outweigh the rest."""
    rows = [r for r in rows if not r["tensor"].startswith(HEAD)]
    a, b, gap = (math.sqrt(sum(r[k] ** 2 for r in rows)) for k in ("norm_a", "norm_b", "difference"))
    dot = sum((r["cosine"] or 0.0) * r["norm_a"] * r["norm_b"] for r in rows)
    return {
        "norm_a": a, "norm_b": b, "cosine": dot / (a * b) if a and b else None, "difference": gap,
        "distance": gap / max(a, b) if max(a, b) else 0.0, "largest": max((r["largest"] for r in rows), default=0.0),
        "tensors": len(rows), "same": sum(r["largest"] == 0 for r in rows),
    }  # fmt: skip


def _strangers(a: Artifact, b: Artifact) -> str:
    """Why two artifacts have no tensors in common."""
    for one in (a, b):
        if one.exported is not None:
            return f"{one.name} is an exported file: its weights have names of its own"
    if a.delta and b.delta and a.delta.backbone.fingerprint != b.delta.backbone.fingerprint:
        one, two = (d.backbone.name or d.backbone.arch for d in (a.delta, b.delta))
        return f"they stand on different backbones: {one} and {two}"
    return ""


def _views(a: Artifact, b: Artifact) -> tuple[str, str, Tensors, Tensors]:
    """By what they are compared, why by nothing better, and both sides."""
    if a.delta is None or b.delta is None:
        return "weights", "", _weights(a), _weights(b)
    try:
        left, right = (_vector(d, one) for d, one in ((a.delta, a), (b.delta, b)))
        if not (len(left) and len(right)) and any(speaks(p) for d in (a.delta, b.delta) for p in d.parts):
            because = "what a text tower learns is no change of the image tower"
            return "tensors of the files", because, a.delta.tensors, b.delta.tensors
        return "task vectors", "", _with_heads(left, a.delta), _with_heads(right, b.delta)
    except NotFoldable as error:
        return "tensors of the files", error.message, a.delta.tensors, b.delta.tensors


def _vector(delta: Delta, artifact: Artifact) -> Tensors:
    """A task vector, of a delta whose tensors are those that its header tells of."""
    base = open_base(delta.backbone, artifact.zoo)
    complete(delta, artifact.name, grounded(base, delta))
    return task_vector(base, delta)


def _weights(artifact: Artifact) -> Tensors:
    """A model's own, a backbone's, or a delta folded."""
    if artifact.delta is not None:
        return fold_artifact(artifact.delta, artifact.zoo, None)
    if artifact.card is not None:
        return open_base(artifact.card, artifact.zoo)
    assert artifact.path is not None
    return TensorFile(artifact.path)


def _with_heads(vectors: Tensors, delta: Delta) -> Tensors:
    own = delta.tensors
    heads = [n for n in own if n.startswith(HEAD)]
    makers = {n: (lambda n=n: vectors[n]) for n in vectors} | {n: (lambda n=n: own[n]) for n in heads}
    return Lazy(makers, {n: shape_of(vectors, n) for n in vectors} | {n: shape_of(own, n) for n in heads})


def _common(left: Tensors, right: Tensors, *, zeros: bool) -> tuple[list[str], tuple[list[str], list[str]]]:
    """The names to compare, and those that only one side has; with `zeros` a task vector's absent tensor is zero."""
    both = [n for n in left if n in right and shape_of(left, n) == shape_of(right, n)]
    alone = [n for n in left if n not in both], [n for n in right if n not in both]
    if not zeros:
        return sorted(both), (sorted(alone[0]), sorted(alone[1]))
    absent = {n for names, other in zip(alone, (right, left), strict=True) for n in names if n not in other}
    absent = {n for n in absent if not n.startswith(HEAD)}
    return sorted({*both, *absent}), (sorted({*alone[0]} - absent), sorted({*alone[1]} - absent))


def _row(name: str, left: Tensors, right: Tensors) -> Row:
    a, b = (side[name].double().reshape(-1) if name in side else None for side in (left, right))
    x, y = _filled(a, b)
    gap, norms = x - y, (float(x.norm()), float(y.norm()))
    lengths, longest = norms[0] * norms[1], max(norms)
    difference = float(gap.norm())
    return {
        "tensor": name, "norm_a": norms[0], "norm_b": norms[1], "cosine": float(x @ y) / lengths if lengths else None,
        "difference": difference, "distance": difference / longest if longest else 0.0,
        "largest": float(gap.abs().max()) if gap.numel() else 0.0,
    }  # fmt: skip


def _filled(a: Tensor | None, b: Tensor | None) -> Iterator[Tensor]:
    """Both, zeros in place of the one that isn't there."""
    like = a if a is not None else b
    assert like is not None
    return (t if t is not None else torch.zeros_like(like) for t in (a, b))

"""What merges work on: one tensor of every task vector at a time, and exact facts about whole task vectors.

A file of this folder is one step of a merge, a plain function named like the file; its keyword-only parameters are its
knobs. Beside it the file has

    PAPER, SYMMETRIC      the source; whether the order of the tasks is without meaning
    LOW_RANK              whether what it makes of low-rank matrices has at most the sum of their ranks, so that it can stay a LoRA
    STAGE                 optional: when it acts, "merge" where nothing is said (see `vtzoo.merges._chain`)
    THEN                  optional: the merge that follows where the spec names none
                          (one that acts on heads is another kind of function: see `vtzoo.merges.surgery`)
    TASKS                 optional: how many task vectors it takes, where not any number
    NEEDS                 optional: what must be given, "images" or "labels" (of every task)
    EVIDENCE              optional: the function of `vtzoo.evidence` that looks at each task's own network on them
    look(scene, **knobs)  optional, in its stead: looks at the merged network (see `vtzoo.merges._scene`)
    IMAGES, HEADS         optional: how many images of each task; True where it looks at what heads predict
    KEEP                  optional: what the result is kept as where nothing is said (see `vtzoo.keeping`)
    mask(vector, merged)  optional: the entries that one task uses of what was merged; each task keeps a network of its own
    RESCALES              optional: True where that network is scaled, too (see `vtzoo.masks`)
    PIECEWISE             optional: the knobs with which each entry is made of the same entry of the tasks alone ({}: any), so that a
                          tensor can be merged in pieces
    DEPTH                 optional: True where it asks how deep a tensor lies
    GROUND                optional: True where it looks at the backbone's own tensors, which no space has coordinates of
    NEUTRAL               optional: False where one task vector doesn't come back, whatever the knobs
    check(weights)        optional: refuses weights that the algorithm can't use, before anything is read

Tensors are computed when a pass comes to them and dropped after it: memory does not grow with the number of tasks.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations
from threading import RLock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from vtzoo.errors import Corrupt
from vtzoo.merges._depth import depths
from vtzoo.merges._floor import PIECE, Entry, floors
from vtzoo.tensors import Lazy, pieces_of, thin_of

Read = Callable[[int, str], Tensor]
Span = tuple[int, int]
BLOCK = 1 << 18
"""So many entries are read at once where a tensor needn't be read whole."""
_NOTHING = 1e-14
"""A product that is smaller than this share of its factors is what rounding to float64 leaves of zero."""
_GROUP = 4
"""The floors of so many task vectors are found in one pass, which reads the backbone once for all of them."""
EVERY = 251
"""One of so many entries is in a sample; a prime, since what repeats along a tensor has other periods."""
T = TypeVar("T")


class Merge(Protocol):
    """The required part of a merge's module; its function is found by the file's name."""

    PAPER: str
    SYMMETRIC: bool
    LOW_RANK: bool


@dataclass(frozen=True, slots=True)
class Vector:
    """One tensor of one task vector; `value` (float32) is the receiver's own, to change in place.

    `key` names the task, the tensor and the step, whatever the order of the tasks: random numbers are drawn by it.
    """

    task: int
    weight: float
    value: Tensor
    key: str = ""


@dataclass(frozen=True, slots=True)
class Vectors:
    """One tensor of every task vector. Each iteration computes those that aren't zero anew, one at a time.

    Attributes:
        name: of the tensor in the backbone.
        shape: of the tensor.
        weights: of all tasks; one that doesn't touch this tensor counts as zero.
        whole: facts about whole task vectors.
        span: which entries of the tensor laid flat these are, where not all.
    """

    name: str
    shape: tuple[int, ...]
    weights: tuple[float, ...]
    whole: "Whole"
    span: Span | None = None

    def __iter__(self) -> Iterator[Vector]:
        for task in self.whole.order:
            if self.weights[task] and self.name in self.whole.names[task]:
                yield self.whole.vector(task, self.name, self.span)

    def products(self) -> Iterator[tuple[float, Tensor, Tensor | None]]:
        """Weight, left [out, r] and right [r, in] (float64) of every task that touches the tensor: a matrix, left @ right.

        Where nothing tells of factors, as with a full fine-tune, left is the tensor and right None.
        """
        for task in self.whole.order:
            if self.weights[task] and self.name in self.whole.names[task]:
                left, right = self.whole.product(task, self.name)
                yield self.weights[task], left, right

    @property
    def count(self) -> int:
        """How many tasks take part: those whose weight isn't zero."""
        return sum(bool(w) for w in self.weights)

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is a map from features to features: see `is_matrix`; its coordinates are one if it is."""
        return is_matrix(self.name, self.whole.outer[self.name])

    @property
    def base(self) -> Tensor:
        """The backbone's own tensor, in float32."""
        return self.whole.ground[self.name].to(torch.float32)

    @property
    def depth(self) -> float:
        """How deep in the network it lies, from 0 to 1."""
        return self.whole.depths[self.name]

    def evidence(self, task: int) -> Tensor | None:
        """What a task's images tell of this tensor (see `vtzoo.evidence`); None where they tell nothing."""
        return self.whole.evidence[task].get(self.name)

    def sum(self, weights: Sequence[float] | None = None) -> Tensor:
        """Add up weight * value.

        Products are rounded before they are added: a fused step would round differently where threads divide a tensor.

        Args:
            weights: one per task, in place of the given ones.
        """
        weights, total = weights or self.weights, torch.zeros(self.shape)
        each = {w for w in weights if w}
        common = each.pop() if len(each) == 1 else 1.0  # multiplied once, in the end
        for vector in self:
            weight = weights[vector.task]
            total += vector.value if weight in (1, common) else vector.value.mul_(weight)
        return total if common == 1 else total.mul_(common)


@dataclass(frozen=True, slots=True)
class Frame:
    """Coordinates for one tensor of every task vector.

    Attributes:
        shape: of the coordinates.
        into: gives the coordinates of a tensor.
        back: gives the tensor of coordinates.
    """

    shape: tuple[int, ...]
    into: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Whole:
    """All task vectors of one merge.

    Args:
        sources: one lazy mapping per task, from names to tensors made anew at each access.
        weights: one per task.
        shapes: of every name that any of them touches.
        order: in which tasks are visited; by default as given.
        labels: what to call each in a message.
        keys: one per task, the same whatever the order; what is random depends on them.
        aside: names that don't count when a share of a whole task vector is taken.
        ground: the backbone's tensors, for the merges that need them.
        evidence: one mapping per task by name of tensor, for the merges that need data.
        outer: the shapes outside of any space.
        together: a pass goes through the tasks name by name, since what it computes for a name serves all of them.
    """

    sources: Sequence[Mapping[str, Tensor]]
    weights: Sequence[float]
    shapes: Mapping[str, tuple[int, ...]]
    order: Sequence[int] = ()
    labels: Sequence[str] = ()
    keys: Sequence[str] = ()
    aside: frozenset[str] = frozenset()
    ground: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    evidence: Sequence[Mapping[str, Tensor]] = ()
    together: bool = False
    outer: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    names: list[frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        count = range(len(self.sources))
        self.weights = tuple(self.weights)
        self.names = [frozenset(s) for s in self.sources]
        self.order = tuple(self.order) or tuple(count)
        self.labels = tuple(self.labels) or tuple(f"task vector {i + 1}" for i in count)
        self.keys = tuple(self.keys) or tuple(str(i) for i in count)
        self.outer = self.outer or self.shapes
        self._floors: dict[tuple[int, float], float] = {}
        self._squares: dict[tuple[int, str], dict[Span, float]] = {}
        self._facts: dict[Hashable, Any] = {}
        self._lock = RLock()

    @cached_property
    def depths(self) -> dict[str, float]:
        """How deep in the network each tensor lies: see `vtzoo.merges._depth`."""
        return depths(set(self.shapes) | set(self.ground))

    def at(self, name: str, span: Span | None = None) -> Vectors:
        """One tensor of every task vector, or some of its entries laid flat."""
        shape = self.shapes[name] if span is None else (span[1] - span[0],)
        return Vectors(name, shape, tuple(self.weights), self, span)

    def in_pieces(self, name: str) -> bool:
        """Whether every task vector that touches a tensor can compute a part of it alone."""
        own = [s for s, names in zip(self.sources, self.names, strict=True) if name in names]
        return all(pieces_of(s, name) is not None for s in own)

    def vector(self, task: int, name: str, span: Span | None = None) -> Vector:
        """One tensor of one task vector, with what is known of it."""
        return Vector(task, self.weights[task], self.read(task, name, span), f"{self.keys[task]}/{name}")

    def read(self, task: int, name: str, span: Span | None = None) -> Tensor:
        """Compute one tensor of one task vector, or some entries of it laid flat, in float32.

        Raises:
            Corrupt: it holds NaN or infinity.
        """
        piece = pieces_of(self.sources[task], name) if span else None
        value = (piece(*span) if span and piece else self.sources[task][name]).to(torch.float32)
        place = span or (0, value.numel())
        if place not in self._squares.setdefault((task, name), {}):
            square = square_of(value)
            self._note(task, name, place, square, finite=math.isfinite(square) or bool(value.isfinite().all()))
        return value

    def _note(self, task: int, name: str, place: Span, square: float, *, finite: bool) -> None:
        """Keep a sum of squares."""
        if not finite:
            raise Corrupt(
                f"{self.labels[task]}: NaN or infinity in {name}", "leave it out, or train it again with a lower --lr"
            )
        self._squares.setdefault((task, name), {})[place] = square

    def product(self, task: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Two matrices whose product a tensor of a task vector is, which is not made; else the tensor and None.

        Raises:
            Corrupt: it holds NaN or infinity.
        """
        pair = thin_of(self.sources[task], name)
        if pair is None:
            return self.read(task, name), None
        left, right = (m.double() for m in pair)
        finite = bool(left.isfinite().all()) and bool(right.isfinite().all())
        inner = torch.linalg.qr(left, "r").R @ torch.linalg.qr(right.T, "r").R.T if finite else torch.zeros(1)
        size = float(inner.norm())  # the product's own: both QRs keep lengths
        whole = (0, left.shape[0] * right.shape[1])
        self._note(task, name, whole, size**2, finite=finite and size < torch.finfo(torch.float32).max)
        if size <= _NOTHING * float(left.norm() * right.norm()):  # PiSSA's two products cancel out, but for rounding
            return torch.zeros(self.shapes[name]), None
        return left, right

    def read_as(
        self, read: Read, shapes: Mapping[str, tuple[int, ...]] | None = None, *, together: bool = False
    ) -> "Whole":
        """The same tasks with other tensors: what `read` gives for a task's number and a name."""
        sources = [Lazy({n: (lambda t=t, n=n: read(t, n)) for n in names}, {}) for t, names in enumerate(self.names)]
        together = together or self.together or shapes is not None
        return replace(self, sources=sources, shapes=self.shapes if shapes is None else shapes, together=together)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """A fact about all task vectors, found at the first call."""
        with self._lock:
            if what not in self._facts:
                self._facts[what] = make()
            return self._facts[what]

    def floor(self, task: int, density: float) -> float:
        """The floor (see `floors`) of a whole task vector, found at the first call, together with some other tasks'; in a space, with all."""
        with self._lock:
            if (task, density) not in self._floors:
                others = (t for t in self.order if t != task and self.weights[t] and (t, density) not in self._floors)
                tasks = [task, *others][: None if self.together else _GROUP]
                sample = None if self.together else partial(self._entries, tasks, thin=True)
                found = floors(partial(self._entries, tasks), len(tasks), density, sample)
                self._floors.update({(t, density): f for t, f in zip(tasks, found, strict=True)})
            return self._floors[task, density]

    def _entries(self, tasks: Sequence[int], *, thin: bool = False) -> Iterator[Entry]:
        """Every tensor of some tasks, by name first: what a space computes once for a name then serves all of them.

        Args:
            tasks: which.
            thin: a few entries of every tensor, for a sample.
        """
        for name in sorted(set(self.shapes) - self.aside):
            count, pieces = math.prod(self.shapes[name]), not self.together and self.in_pieces(name)
            spans = spans_of(count, BLOCK if pieces else count)
            read = self._thinned if thin else self.read
            for span in spans:
                for i, task in enumerate(tasks):
                    if name in self.names[task]:
                        yield i, partial(read, task, name, span if pieces else None)

    def _thinned(self, task: int, name: str, span: Span | None) -> Tensor:
        """A few of some entries."""
        piece = pieces_of(self.sources[task], name)
        if span is None or piece is None:
            return self.read(task, name).reshape(-1)[::EVERY]
        return piece(*span, EVERY).float()

    def norms(self) -> list[float]:
        """The L2 norm of each task vector; what no merge has read yet is read."""
        found: list[float] = []
        for task, names in enumerate(self.names):
            for name in names:
                if (task, name) not in self._squares:
                    self.read(task, name)
            found.append(math.sqrt(sum(_total(self._squares[task, n]) for n in sorted(names))))
        return found

    def agreement(self) -> dict[tuple[int, int], float | None]:
        """How far the task vectors point the same way, in a pass of its own.

        Returns:
            For each pair (i, j), i < j, the share of the entries moved by both that both move the same way; None where no entry
            is moved by both.
        """
        count = len(self.sources)
        same, both = _square(count), _square(count)
        for name in sorted(self.shapes):
            tasks = [t for t in range(count) if name in self.names[t]]
            signs: list[Tensor] = []
            for task in tasks:
                signs.append(self.read(task, name).reshape(-1).sign_().to(torch.int8))
            place = torch.tensor(tasks)
            for chunk in torch.stack(signs).split(PIECE, dim=1):
                sign = chunk.to(torch.float32)
                moved = (sign.abs() @ sign.abs().T).double()
                both[place[:, None], place] += moved
                same[place[:, None], place] += (moved + (sign @ sign.T).double()) / 2
        pairs = combinations(range(count), 2)
        return {(i, j): float(same[i, j] / both[i, j]) if both[i, j] else None for i, j in pairs}


def square_of(value: Tensor) -> float:
    """The sum of squares, in pieces that a cache holds, added up in float64."""
    found = sum(float(torch.dot(piece, piece)) for piece in value.reshape(-1).split(PIECE))
    return found if math.isfinite(found) else float(value.double().square_().sum())


def spans_of(count: int, size: int) -> list[Span]:
    """Entries 0 to `count` in spans of `size`."""
    return [(a, min(a + size, count)) for a in range(0, count, max(size, 1))]


def _total(squares: Mapping[Span, float]) -> float:
    """Of a tensor that was read in spans, of one size or of several: each entry counts once."""
    longest = {start: (stop, squares[start, stop]) for start, stop in sorted(squares)}
    total, place = 0.0, 0
    while place in longest:
        stop, square = longest[place]
        total += square
        place = stop if stop > place else -1  # an empty tensor ends where it begins
    return total


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a linear's weight or a dense convolution's kernel, and no table, token, norm or bias."""
    matrix = len(shape) == 2 or (len(shape) == 4 and shape[1] > 1)
    return matrix and name.endswith("weight") and min(shape[0], math.prod(shape[1:])) > 1


def _square(count: int) -> Tensor:
    return torch.zeros(count, count, dtype=torch.float64)

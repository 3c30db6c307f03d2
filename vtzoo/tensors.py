"""Tensors by name, read when needed: safetensors files, lazy mappings, and a deterministic streaming writer."""

import hashlib
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock, local
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from vtzoo import files
from vtzoo.errors import Corrupt, ShapeMismatch

Factors = tuple[Tensor, Tensor]
"""Two matrices whose product counts, [out, r] and [r, in]."""
T = TypeVar("T")
R = TypeVar("R")


class Piece(Protocol):
    """Gives the entries start, start + every, … below stop of a tensor laid flat."""

    def __call__(self, start: int, stop: int, every: int = 1) -> Tensor:
        """Some entries."""
        ...


WORKERS = 2
"""How many tensors are computed at once where many lie ahead."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {v: k for k, v in DTYPES.items()}


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; the header is checked at once, each tensor is read when asked for, by any thread.

    Read, not mapped: a process that streams through many files keeps no pages of them.

    Raises:
        Corrupt: damaged, truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = files.header(path)
        self._source = _Source(path)

    def __getitem__(self, name: str) -> Tensor:
        span = self.header.tensors[name]
        value = torch.empty(span.shape, dtype=self.dtype(name))
        if value.numel():
            place = value.reshape(-1).view(torch.uint8).numpy().data
            self._source.read_into(place, self.header.data_start + span.start)
        return value

    def pieces(self, name: str) -> Piece:
        """What reads some entries of a tensor laid flat, and no others."""
        span, dtype = self.header.tensors[name], self.dtype(name)
        first = self.header.data_start + span.start

        def read(start: int, stop: int, every: int = 1) -> Tensor:
            count = stop - start
            value = torch.empty(count, dtype=dtype) if every == 1 else _room(count * dtype.itemsize).view(dtype)
            self._source.read_into(value.view(torch.uint8).numpy().data, first + start * dtype.itemsize)
            return value if every == 1 else value[::every].clone()

        return read

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.header.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the header."""
        code = self.header.tensors[name].dtype
        if code not in DTYPES:
            raise Corrupt(f"{self.path}: {name} is {code}, which is not read here", "store it as F32, F16 or BF16")
        return DTYPES[code]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self.header.tensors[name].shape)


_own = local()


def _room(size: int) -> Tensor:
    """Bytes of this thread's own, for what is read and thrown away: new memory would take longer than reading."""
    if getattr(_own, "room", None) is None or _own.room.numel() < size:
        _own.room = torch.empty(size, dtype=torch.uint8)
    return _own.room[:size]


class _Source:
    """A file open for reading at any place, by several threads at once; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        with files.reading(path):
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.path, self._lock = path, Lock()
        weakref.finalize(self, os.close, self._file)

    def read_into(self, place: memoryview, start: int) -> None:
        """Fill `place` with the bytes from `start` on.

        Raises:
            Corrupt: the file ends before.
        """
        done = 0
        with files.explained(self.path, "read"):
            while done < len(place) and (count := self._read(place[done:], start + done)):
                done += count
        if done < len(place):
            raise Corrupt(f"{self.path} has become shorter while it was read", "fetch it or make it again")

    def _read(self, place: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [place], start)
        with self._lock:  # Windows has no call that does both
            os.lseek(self._file, start, os.SEEK_SET)
            data = os.read(self._file, len(place))
        place[: len(data)] = data
        return len(data)


class Lazy(Mapping[str, Tensor]):
    """Names with recipes: each access computes its tensor anew, nothing is kept.

    Args:
        makers: what computes each tensor.
        shapes: of all of them.
        dtypes: of those that are known beforehand, so that a writer need not compute a tensor twice.
        pieces: what computes a part of a tensor, of those that needn't be computed whole.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype] | None = None,
        pieces: Mapping[str, Piece] | None = None,
    ) -> None:
        self._makers, self._shapes, self._dtypes = dict(makers), dict(shapes), dict(dtypes or {})
        self._pieces = dict(pieces or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the tensor
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def pieces(self, name: str) -> Piece | None:
        """What computes some entries of a tensor laid flat, where it needn't be computed whole."""
        return self._pieces.get(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype where it is known beforehand."""
        return self._dtypes.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without computing it."""
        return self._shapes[name]


class Latest(Lazy):
    """A mapping that remembers the last tensors it gave, or parts of them, one per worker: all task vectors start from it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({n: (lambda n=n: tensors[n]) for n in tensors}, {})
        self._tensors, self._get = tensors, lru_cache(maxsize=WORKERS)(tensors.__getitem__)
        self._part = lru_cache(maxsize=WORKERS)(self._read)
        self._thin = cache(self._read)  # a sample of all is small

    def _read(self, name: str, start: int, stop: int, every: int) -> Tensor:
        piece = pieces_of(self._tensors, name)
        assert piece is not None
        return piece(start, stop, every)

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, likewise."""
        return dtype_of(self._tensors, name)

    def pieces(self, name: str) -> Piece | None:
        """A part of a tensor, from what lies underneath."""
        if pieces_of(self._tensors, name) is None:
            return None
        return lambda start, stop, every=1: (self._part if every == 1 else self._thin)(name, start, stop, every)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from what lies underneath."""
        return shape_of(self._tensors, name)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """A tensor's shape, from the mapping's own knowledge where it has any."""
    known = getattr(tensors, "shape", None)
    return known(name) if known is not None else tuple(tensors[name].shape)


def pieces_of(tensors: Mapping[str, Tensor], name: str) -> Piece | None:
    """What gives some entries of a tensor laid flat, where the mapping can without computing the rest."""
    known = getattr(tensors, "pieces", None)
    return known(name) if known is not None else None


def thin_of(tensors: Mapping[str, Tensor], name: str) -> Factors | None:
    """[out, r] and [r, in] whose product a matrix is, where the mapping knows them."""
    known = getattr(tensors, "factors", None)
    return known(name) if known is not None else None


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """A tensor's dtype, from the mapping's own knowledge where it has any; else the tensor is computed."""
    known = getattr(tensors, "dtype", None)
    found: torch.dtype | None = known(name) if known is not None else None
    return tensors[name].dtype if found is None else found


def bytes_of(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many bytes a tensor takes."""
    return math.prod(shape_of(tensors, name)) * dtype_of(tensors, name).itemsize


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> Lazy:
    """The tensors below a prefix, with the prefix taken off; one that ends in "/" is a folder, whose subfolders are left out."""
    names = [n for n in tensors if n.startswith(prefix) and not (prefix.endswith("/") and "/" in n[len(prefix) :])]
    return view(tensors, {n[len(prefix) :]: n for n in names})


def view(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Lazy:
    """Some tensors by other names (new to old), with what the mapping knows of them without computing any."""
    makers, shapes = (
        {k: (lambda n=n: tensors[n]) for k, n in names.items()},
        {k: shape_of(tensors, n) for k, n in names.items()},
    )
    known = getattr(tensors, "dtype", None)
    dtypes = {k: found for k, n in names.items() if known and (found := known(n)) is not None}
    return Lazy(makers, shapes, dtypes, {k: p for k, n in names.items() if (p := pieces_of(tensors, n)) is not None})


@contextmanager
def one_thread() -> Generator[None]:
    """Compute in one thread: the same bits whatever the number of threads that torch would take."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None,
    workers: int = 1,
) -> str:  # fmt: skip
    """Write safetensors atomically, `workers` tensors in memory at a time; equal content gives equal bytes.

    Args:
        path: where; it appears only when complete.
        tensors: computed one by one. A floating tensor is cast to `dtype` once, if given. Wide numbers come first, then
            by name, so that every tensor lies at a multiple of its own width, as readers that map the file want it.
        metadata: the header's string map; written with sorted keys.
        dtype: None keeps each tensor's own.
        workers: how many tensors are computed at once, each in one thread where there is more than one.

    Returns:
        The file's sha256, 64 hex digits.

    Raises:
        Corrupt: a tensor holds NaN or infinity, or does in the new dtype.
        Resources: the disk is full.
    """
    kinds, digest = _kinds(tensors, dtype), hashlib.sha256()
    with files.atomic_write(path) as out:

        def put(data: bytes | memoryview) -> None:
            with files.explained(Path(path), "write"):
                out.write(data)
            digest.update(data)  # while the workers compute

        put(files.safetensors_header([(n, *kind) for n, kind in kinds.items()], metadata))
        made = ahead(tensors.__getitem__, list(kinds), workers)
        for (name, (code, shape)), tensor in zip(kinds.items(), made, strict=True):
            _put(put, name, tensor, code, shape)
    return digest.hexdigest()


def ahead(make: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`make` of each item in order, by threads that keep at it while one result is looked at, and are no further ahead."""
    if workers < 2:
        yield from map(make, items)
        return
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        waiting = deque[Future[R]]()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _kinds(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Code and shape of each tensor as it will be written, in the order of writing."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in sorted(tensors):
        own = dtype_of(tensors, name)
        kind = dtype if dtype is not None and own.is_floating_point else own
        if kind not in CODES:
            raise Corrupt(f"tensor {name} is {kind}, which is not stored", "cast it to float32 first")
        found[name] = (CODES[kind], shape_of(tensors, name))
    return dict(sorted(found.items(), key=lambda item: -DTYPES[item[1][0]].itemsize))  # stable: by name within a width


def _put(put: Callable[[memoryview], None], name: str, tensor: Tensor, code: str, shape: tuple[int, ...]) -> None:
    wanted = DTYPES[code]
    if tuple(tensor.shape) != shape:
        raise Corrupt(f"tensor {name} came out as {tuple(tensor.shape)} instead of {shape}", "report this as a bug")
    flat = tensor.detach().to("cpu", wanted).contiguous().reshape(-1)
    if wanted.is_floating_point and not _finite(flat):
        if bool(torch.isfinite(tensor).all()):
            raise Corrupt(f"tensor {name} holds numbers too large for {code}", "keep float32, or use bfloat16")
        raise Corrupt(f"tensor {name} holds NaN or infinity", "train again with a lower --lr, or check the source file")
    if flat.numel():
        put(flat.view(torch.uint8).numpy().data)


def _finite(flat: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a sum of squares tells it faster than a look at each, where it doesn't overflow."""
    quick = flat.dtype in (torch.float32, torch.float64)
    pieces = flat.split(1 << 16)
    return all((quick and math.isfinite(torch.dot(p, p).item())) or bool(p.isfinite().all()) for p in pieces)


def working(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which processes keep parts, put together; all processes must ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a delta's tensors to their places on a model; none may be left over on either side, or what was drawn at random would stay.

    Raises:
        ShapeMismatch: a tensor without a place, a place without a tensor, or another shape.
        Corrupt: NaN or infinity.
    """
    for name in tensors:
        if name not in places:
            said = f"the delta holds {name}, which has no place in this model"
            raise ShapeMismatch(said, "is the file complete and from this vtzoo version?")
        if tuple(places[name].shape) != shape_of(tensors, name):
            said = f"{name} is {list(shape_of(tensors, name))} in the delta, {list(places[name].shape)} in the model"
            raise ShapeMismatch(said, "build the model that the delta names")
    lacking = [n for n in places if n not in tensors]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ShapeMismatch(f"the delta lacks {lacking[0]}{more}", "fetch the file again")
    for name, value in tensors.items():
        if value.is_floating_point() and not _finite(value.reshape(-1)):
            raise Corrupt(f"{name} holds NaN or infinity in the delta", "fetch the file again, or train it again")
        places[name].copy_(value)

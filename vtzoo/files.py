"""Files that are whole or absent: the safetensors header by the standard library alone, digests, atomic writes.

A file or folder is written under a unique temporary name beside its place, synced, then renamed into it. Whatever
stops the writing (an error, a full disk, Ctrl-C) removes the temporary name and leaves the place as it was.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vtzoo import strict
from vtzoo.errors import Conflict, Corrupt, NotFound, Resources, UsageError, VtzooError
from vtzoo.refs import shown

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one value by the format's dtype codes."""

_RANK_LIMIT = 64
_SIZE_LIMIT = 2**63
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRONG_PLACE = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor's place in a safetensors file; `start` and `end` count bytes from the header's end (`data_start`)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself; `data_start` counts bytes from the file's start."""

    metadata: dict[str, str]
    tensors: dict[str, Span]
    data_start: int


def header(path: str | Path) -> Header:
    """Read a safetensors header and check that the file is whole.

    Raises:
        NotFound: no such file.
        Corrupt: truncated, damaged, or not a safetensors file; the message names the file and the reason.
    """
    path = Path(path)
    with reading(path), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            return _parse(file, size_bytes)
        except ValueError as error:
            raise Corrupt(f"{path} is no sound safetensors file: {error}", "fetch it or make it again") from error


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Build the bytes that stand before the data; equal content gives equal bytes.

    Args:
        tensors: (name, dtype code, shape) in the order in which the data will be written, without gaps.
        metadata: the string map; left out when empty.

    Raises:
        UsageError: it says more than is read again.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + _size_bytes(dtype, shape)
        table[name] = {"data_offsets": [offset, end], "dtype": dtype, "shape": list(shape)}
        offset = end
    text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > strict.LIMIT_BYTES:
        raise UsageError(
            f"a header of {len(text)} bytes (the limit is {strict.LIMIT_BYTES})", "keep fewer tensors or labels"
        )
    return struct.pack("<Q", len(text)) + text


def sha256(path: str | Path) -> str:
    """Digest a file, streamed; 64 hex digits."""
    path = Path(path)
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Digest bytes; 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def atomic_write(
    path: str | Path, *, mode: int | None = None, guard: Callable[[], None] | None = None
) -> Generator[BinaryIO, None, None]:
    """Give a binary file that takes its place only when the block ends well.

    Args:
        path: where; a link is followed, an existing file replaced, its permissions kept.
        mode: permissions instead of the usual ones.
        guard: called at the last moment before the file takes its place; may raise to refuse.

    Raises:
        NotFound: the folder does not exist.
        UsageError: the place is a folder or no ordinary file.
        Resources: the disk or a quota is full.
        VtzooError: no permission.
    """
    path = _place(Path(path))
    temporary = _beside(path)
    try:
        with synced(temporary, path) as file:
            yield file
        with writing(path):
            _set_mode(temporary, path, mode)
            if guard is not None:
                guard()
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # never in the way of the error that led here
            temporary.unlink()


@contextmanager
def synced(path: Path, named: Path | None = None) -> Generator[BinaryIO, None, None]:
    """Give a new binary file that is on the disk when the block ends well; `named` is what messages call it.

    Raises:
        Resources: the disk or a quota is full.
        VtzooError: it can't be written.
    """
    named = named or path
    with writing(named):
        file = path.open("xb")
    try:
        with _full_disk(named):
            yield file
        with writing(named):
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):  # on the way out of an error: a full disk can't flush; else all is flushed
            file.close()


def atomic_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as given) atomically."""
    data = text.encode()
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def atomic_dir(path: str | Path) -> Generator[Path, None, None]:
    """Give a temporary sibling folder that becomes `path` when the block ends well.

    Raises:
        Conflict: `path` exists.
        NotFound: the folder around it does not exist.
        Resources: the disk or a quota is full.
    """
    path = Path(path).absolute()
    temporary = _beside(path)
    _refuse_existing(path)
    try:
        with writing(path):
            temporary.mkdir()
        with _full_disk(path):
            yield temporary
        with writing(path):
            _sync_tree(temporary)
            _refuse_existing(path)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reading(path: Path) -> Generator[None, None, None]:
    """Turn the system's refusals to read an ordinary file into ours, with the path in the message."""
    with explained(path, "read"):
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "no ordinary file"
            raise UsageError(f"{path} is {what}, a file is wanted", "name a file")
        yield


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Turn the system's refusals to write into ours, with the path in the message."""
    with explained(path, "write"):
        yield


@contextmanager
def explained(path: Path, what: str) -> Generator[None, None, None]:
    """Turn the system's refusals to read or write what is open already into ours, with the path in the message."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, path, what) from error


@contextmanager
def _full_disk(path: Path) -> Generator[None, None, None]:
    """Explain a full disk only: other errors of a caller's block are the caller's."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _refusal(error, path, "write") from error


def _refusal(error: OSError, path: Path, what: str) -> VtzooError:
    said = f"can't {what} {path}: {(error.strerror or str(error)).lower()}"
    if error.errno in _FULL:
        return Resources(said, "free some space (vtzoo rm, or another disk), then repeat the command")
    if error.errno == errno.ENOENT:
        if what == "read":
            return NotFound(f"{path} does not exist", "check the path")
        if path.parent.is_dir():  # /proc, say: there, but nobody can make a file in it
            return UsageError(f"{path.parent} takes no new files", "choose another place")
        return NotFound(f"{path.parent} does not exist", f"make it: mkdir -p {path.parent}")
    if error.errno in _TAKEN:
        return Conflict(f"{path} exists already", "choose another place, or remove it first")
    if error.errno in _WRONG_PLACE:
        return UsageError(said, "choose another path")
    where = path if what == "read" else path.parent
    return VtzooError(said, f"check the permissions of {where}, or choose another place")


def _parse(file: BinaryIO, size_bytes: int) -> Header:
    """Raise ValueError with the reason."""
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"it has {size_bytes} bytes, fewer than the 8 of a header's length")
    length = int.from_bytes(start, "little")
    if length > strict.LIMIT_BYTES:
        raise ValueError(f"a header of {length} bytes (the limit is {strict.LIMIT_BYTES})")
    if 8 + length > size_bytes:
        raise ValueError(f"truncated: a header of {length} bytes in a file of {size_bytes}")
    table = _json(file.read(length))
    metadata = _metadata(table.pop("__metadata__", {}))
    tensors = {name: _span(name, entry) for name, entry in table.items()}
    _check_layout(tensors, size_bytes - 8 - length)
    return Header(metadata, tensors, 8 + length)


def _json(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        table = strict.record(data)
    except ValueError as error:
        raise ValueError(f"its header {error}") from error
    "".join(table).encode()  # a lone surrogate in a name: UnicodeEncodeError is a ValueError
    return table


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", value).values()):
        raise ValueError("its metadata is no map of strings")
    return cast("dict[str, str]", value)


def _span(name: str, entry: Any) -> Span:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {shown(name)} has no description")  # noqa: TRY004 - damaged data, caught in `header`
    entry = cast("dict[str, Any]", entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise ValueError(f"tensor {shown(name)} has the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has the offsets {shown(offsets)}")
    start, end = offsets
    try:
        wanted = _size_bytes(dtype, shape)
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)}: {error}") from None
    if end - start != wanted:
        raise ValueError(f"tensor {shown(name)} ({dtype} {shape}) needs {wanted} bytes and has {end - start}")
    return Span(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _SIZE_LIMIT for v in cast("list[Any]", value))


def _size_bytes(dtype: str, shape: Sequence[int]) -> int:
    bits = BITS[dtype]
    for size in shape:
        bits *= size or 1  # a zero doesn't excuse what overflows beside it
        if bits >= _SIZE_LIMIT:
            raise ValueError(f"the shape {list(shape)} is too large")
    bits *= 0 not in shape
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8


def _check_layout(tensors: dict[str, Span], data_bytes: int) -> None:
    """Spans must follow each other without gap or overlap and fill the file to its last byte."""
    end = 0
    for name, span in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != end:
            raise ValueError(f"tensor {shown(name)} starts at byte {span.start} of the data, expected {end}")
        end = span.end
    if end > data_bytes:
        raise ValueError(f"truncated: its tensors need {end} bytes, {data_bytes} are there")
    if end < data_bytes:
        raise ValueError(f"{data_bytes - end} bytes follow its last tensor")


def _place(path: Path) -> Path:
    with writing(path):
        real = path.resolve()
        kind = real.stat().st_mode if real.exists() else stat.S_IFREG
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "no ordinary file"
        raise UsageError(f"{path} is {what}, a file is to be written there", "choose another path")
    return real


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:24]}.{secrets.token_hex(8)}.tmp")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise Conflict(f"{path} exists already", "choose another place, or remove it first")


def _set_mode(temporary: Path, path: Path, mode: int | None) -> None:
    if mode is None and path.exists():
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode is not None:
        temporary.chmod(mode)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system can."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:  # some file systems can't sync a folder; the rename is done all the same
            raise


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows can sync neither a folder nor a file opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

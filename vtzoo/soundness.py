"""Whether what a zoo holds is what its index says: digests, sizes, headers, finite numbers, places and modes, each file read once.

A file is hashed and looked through while it streams by, CHUNK_BYTES at a time, and hashlib and numpy let other threads run meanwhile.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vtzoo import strict
from vtzoo.errors import Corrupt, VtzooError
from vtzoo.files import Header, explained, header
from vtzoo.headers import read_header
from vtzoo.refs import Entry, check_contained, objects_of
from vtzoo.zoo import Zoo

CHUNK_BYTES = 4 << 20
_TENSORS, _CONFIG = ".safetensors", "config.json"
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BFLOAT16_EXPONENT = 0x7F80


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """One object: how large it is, and what is wrong with it."""

    size_bytes: int = 0
    wrong: tuple[str, ...] = ()


def names_of(entry: Entry) -> dict[str, str]:
    """An entry's objects, the digest by what it is called in messages; a suffix says what is in it."""
    files: Mapping[str, str] = entry.facts.get("files") or {}
    named = {name: digest for name, digest in files.items() if entry.section != "backbones"}
    rest = objects_of(entry.section, {**entry.facts, "signature": None}) - set(named.values())
    return named | {f"{digest[:12]}….safetensors": digest for digest in rest}


def look(zoo: Zoo, name: str, digest: str) -> Looked:
    """Read an object, and everything that is wrong with it."""
    try:
        path = check_contained(zoo.object(digest), zoo.root)
        size, mode = path.stat().st_size, stat.S_IMODE(path.stat().st_mode)
    except (VtzooError, OSError) as error:
        return Looked(wrong=(f"{name}: {error}",))
    wrong: list[str] = []
    if os.name == "posix" and mode & 0o222:
        wrong.append(f"{name} can be written to (mode {mode:o}, not 444)")
    try:
        head = header(path) if name.endswith(_TENSORS) else None
        with explained(path, "read"), path.open("rb") as file:
            seen, odd = _streamed(file, head)
        wrong += [f"{name}: {tensor} holds NaN or infinity" for tensor in odd]
    except VtzooError as error:
        wrong.append(f"{name}: {error}")
        seen = _hashed(path)
    if seen != digest:
        wrong.insert(0, f"{name} is damaged: it should have the digest {digest[:12]}…, and has {seen[:12]}…")
    return Looked(size_bytes=size, wrong=tuple(wrong))


def says(zoo: Zoo, entry: Entry, size_bytes: int) -> Iterator[str]:
    """Where an entry's facts and what its files say of themselves differ."""
    told = entry.facts.get("size_bytes")
    if told is not None and told != size_bytes:
        yield f"the index says {told} bytes, its files have {size_bytes}"
    try:
        if entry.section == "deltas":
            yield from _differences(entry.facts, read_header(zoo.object(entry.digest)))
        elif digest := (entry.facts.get("files") or {}).get(_CONFIG):
            with zoo.object(digest).open("rb") as file:
                strict.record(file.read(strict.LIMIT_BYTES + 1))
    except (VtzooError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        yield f"{_CONFIG} {error}" if isinstance(error, ValueError) else f"its header is garbled: {error}"


def _differences(facts: Mapping[str, Any], doc: Mapping[str, Any]) -> Iterator[str]:
    inside = {
        "method": doc["method"], "fingerprint": doc["backbone"].get("fingerprint"), "tasks": [t["name"] for t in doc["tasks"]],
    }  # fmt: skip
    for key, value in inside.items():
        if facts.get(key) is not None and facts[key] != value:
            yield f"the index says {key} {facts[key]}, its file {value}"


def _streamed(file: BinaryIO, head: Header | None) -> tuple[str, list[str]]:
    """The digest, and the tensors that are not finite."""
    digest, odd = hashlib.sha256(), list[str]()
    for name, code, count in _parts(head):
        if not _read(file, count, digest.update, _finite(code)):
            odd.append(name)
    _read(file, None, digest.update, _finite(""))
    return digest.hexdigest(), odd


def _parts(head: Header | None) -> Iterator[tuple[str, str, int]]:
    """What follows what in a file: name, dtype, bytes."""
    if head is None:
        return
    yield "", "", head.data_start
    for name, span in sorted(head.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        yield name, span.dtype, span.end - span.start


def _read(
    file: BinaryIO, count: int | None, take: Callable[[memoryview], None], fine: Callable[[memoryview], bool]
) -> bool:
    """So many bytes, or all that are left; whether every chunk is fine."""
    room, every = memoryview(bytearray(min(CHUNK_BYTES, CHUNK_BYTES if count is None else count))), True
    while count is None or count > 0:
        chunk = room[: file.readinto(room if count is None else room[:count])]  # type: ignore[attr-defined] - of binary files
        if not chunk:
            if count is None:
                return every
            raise Corrupt("it has become shorter while it was read", "fetch it or make it again")
        take(chunk)
        every = fine(chunk) and every
        count = None if count is None else count - len(chunk)
    return every


def _finite(code: str) -> Callable[[memoryview], bool]:
    if code in _FLOATS:
        return lambda chunk: bool(np.isfinite(np.frombuffer(chunk, _FLOATS[code])).all())
    if code == "BF16":
        return lambda chunk: bool((~np.frombuffer(chunk, "<u2") & _BFLOAT16_EXPONENT).all())
    return lambda _: True


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

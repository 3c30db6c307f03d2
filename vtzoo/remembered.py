"""What large index files say, remembered in the user's cache folder under the digest of their bytes.

Reading YAML takes many times as long as reading the same content as JSON (benchmarks/bench_zoo.py). Only what this vtzoo has read and checked
(or written) itself is remembered, in a folder of the user's own: a zoo from elsewhere can't bring its memory along, and
where several users share that folder, nobody believes what another one wrote.
"""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from vtzoo.errors import VtzooError
from vtzoo.files import atomic_write, sha256_bytes

LARGE_BYTES = 1 << 15
"""Smaller ones are read faster than looked up."""

_KEPT = 8


def recall(data: bytes) -> str | None:
    """The JSON text that was remembered for these bytes."""
    if len(data) < LARGE_BYTES:
        return None
    with suppress(OSError):
        path = _place(data)
        with path.open("rb") as file:
            owner = os.fstat(file.fileno()).st_uid
            digest, _, text = file.read().partition(b"\n")
        if digest.decode(errors="replace") == _check(path, text) and owner == getattr(os, "geteuid", lambda: owner)():
            os.utime(path)
            return text.decode()
    return None


def remember(data: bytes, text: str) -> None:
    """Keep a JSON text for these bytes; the last few files stay. A folder that takes no files is no error."""
    if len(data) < LARGE_BYTES:
        return
    with suppress(OSError, VtzooError):
        path, content = _place(data), text.encode()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(path, mode=0o600) as file:
            file.write(f"{_check(path, content)}\n".encode() + content)
        for old in sorted(path.parent.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)[:-_KEPT]:
            old.unlink()


def _check(path: Path, text: bytes) -> str:
    """What the first line says: that this is whole, and what is remembered under this name."""
    return sha256_bytes(path.name.encode() + text)


def _place(data: bytes) -> Path:
    return _folder() / f"{sha256_bytes(_rules() + data)}.json"


@cache
def _folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("vtzoo", appauthor=False) / "index"


@cache
def _rules() -> bytes:
    """What decides how bytes are read: another version of these modules may read them otherwise."""
    from vtzoo import __version__

    sources = (Path(__file__).with_name(f"{name}.py") for name in ("catalogue", "refs"))
    return f"{__version__} {[s.stat().st_size if s.exists() else 0 for s in sources]}".encode()

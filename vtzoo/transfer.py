"""One object from elsewhere into a zoo: announced, resumed, hashed while it streams, adopted when it is what it should be.

A file of the wrong digest is not thrown away. It is fetched again range by range over what is there, each range until
it has come the same twice; the ranges that differed are named. If the digest is still wrong, it stays in quarantine.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path

from vtzoo import patience
from vtzoo.errors import Corrupt, NotFound, Resources, VtzooError
from vtzoo.files import explained, header, sha256
from vtzoo.machine import free_bytes
from vtzoo.objects import renewed
from vtzoo.patience import Dropped, patiently
from vtzoo.quarantine import claimed, come
from vtzoo.remotes import Remote
from vtzoo.talk import say
from vtzoo.zoo import Zoo

RANGE_BYTES = 8 << 20
_PROGRESS_BYTES = 64 << 10
_SPARE_BYTES = 1 << 20
_ROUNDS = 3


def fetch(remote: Remote, digest: str, zoo: Zoo, *, most_bytes: int | None = None, tensors: bool = False) -> int:
    """Bring an object into a zoo, if it does not hold it; gives the bytes that were received for it.

    Args:
        remote: where from.
        digest: its sha256.
        zoo: where to.
        most_bytes: what the index says of its size; more is refused before the first byte.
        tensors: whether it is to be a safetensors file; checked before it is adopted.

    Raises:
        NotFound: the remote does not hold it.
        Corrupt: it is not what the index says; what came stays in quarantine.
        Network: the connection broke too often; what came is kept.
        Resources: the disk has not enough room, or is full.
    """
    if holds(zoo, digest) and renewed(zoo.object(digest)):
        return 0
    size = announced(remote, digest, most_bytes)
    _check_room(zoo.root, size - come(zoo.root, digest))
    with claimed(zoo.root, digest) as path:
        received = _complete(remote, digest, path, size)
        if tensors:
            header(path)
        zoo.adopt(path, digest)
    return received


def holds(zoo: Zoo, digest: str) -> bool:
    """Whether a zoo has an object, whole."""
    with suppress(NotFound):
        return sha256(zoo.object(digest)) == digest
    return False


def announced(remote: Remote, digest: str, most_bytes: int | None = None) -> int:
    """The size of an object in bytes, before it is fetched.

    Raises:
        Corrupt: more than the index says, or nobody says.
    """
    size = patiently(lambda: remote.size(digest))
    if size is None:
        size = most_bytes
    if size is None or size < 0:
        raise Corrupt(f"neither {remote.where} nor its index says the size of {digest[:12]}…", "ask who keeps that zoo")
    if most_bytes is not None and size > most_bytes:
        raise Corrupt(
            f"{remote.where} announces {size} bytes of {digest[:12]}…, its index says {most_bytes}",
            "ask who keeps that zoo",
        )
    return size


def _check_room(folder: Path, wanted_bytes: int) -> None:
    free = free_bytes(folder)
    if wanted_bytes + _SPARE_BYTES > free:
        raise Resources(
            f"{wanted_bytes / 1e6:,.1f} MB are to come, and the zoo's disk has {free / 1e6:,.1f}",
            "free some space, or choose another zoo with --zoo",
        )


def _complete(remote: Remote, digest: str, path: Path, size: int) -> int:
    """Fetch what is missing of a file; gives the bytes received."""
    with explained(path, "write"), path.open("r+b") as file:
        file.truncate(min(size, path.stat().st_size))
        seen = hashlib.file_digest(file, "sha256")
        have = file.tell()

        def append(_: int, piece: bytes) -> None:
            seen.update(piece)
            file.write(piece)

        received = _receive(remote, digest, have, size, append)
        if seen.hexdigest() != digest:
            received += _mend(remote, digest, file, size)
        file.flush()
        os.fsync(file.fileno())
    return received


def _receive(remote: Remote, digest: str, start: int, end: int, take: Callable[[int, bytes], None]) -> int:
    """Hand bytes [start, end) and their places to `take`, going on where a connection broke; gives their number.

    Raises:
        Network: it broke too often without getting anywhere.
    """
    at, failures = start, 0
    while at < end:
        before = at
        try:
            for piece in _pieces(remote, digest, at, end):
                take(at, piece)
                at += len(piece)
        except Dropped as error:
            failures = 1 if at - before >= _PROGRESS_BYTES else failures + 1
            if failures >= patience.PATIENCE.tries:
                raise
            say(f"{error.message}; going on at byte {at:,} of {end:,}")
            patience.PATIENCE.pause(failures)
    return end - start


def _pieces(remote: Remote, digest: str, start: int, end: int) -> Iterator[bytes]:
    """What one request brings of bytes [start, end).

    Raises:
        Dropped: less than all, or too slowly.
    """
    for piece in patience.PATIENCE.watched(remote.stream(digest, start, end)):
        yield piece
        start += len(piece)
    if start < end:
        raise Dropped(f"{remote.where} ended {end - start:,} bytes early", "try again; what has come is kept")


def _mend(remote: Remote, digest: str, file: BufferedRandom, size: int) -> int:
    """Fetch a file of the wrong digest again over itself; gives the bytes received.

    Raises:
        Corrupt: it is still wrong.
    """
    say(f"{digest[:12]}… has not the digest of its name; comparing it range by range")
    length = RANGE_BYTES if remote.ranges else max(size, 1)
    received, differing = 0, list[str]()
    for start in range(0, size, length):
        end = min(start + length, size)
        for round_ in range(_ROUNDS):
            came, same = _compare(remote, digest, file, start, end)
            received += came
            if same:
                break
            if not round_:
                differing.append(f"{start:,} to {end - 1:,}")
    file.seek(0)
    named = ", ".join(differing)
    if hashlib.file_digest(file, "sha256").hexdigest() == digest:
        say(f"bytes {named} differed; now {digest[:12]}… is whole")
        return received
    why = f"bytes {named} came differently" if differing else "all of it came the same twice: the copy there is damaged"
    raise _wrong(remote, digest, why)


def _compare(remote: Remote, digest: str, file: BufferedRandom, start: int, end: int) -> tuple[int, bool]:
    """Write a range again; gives the bytes received and whether they were the same as before."""
    same = True

    def rewrite(at: int, piece: bytes) -> None:
        nonlocal same
        file.seek(at)
        if file.read(len(piece)) != piece:
            same = False
            file.seek(at)
            file.write(piece)

    return _receive(remote, digest, start, end, rewrite), same


def _wrong(remote: Remote, digest: str, why: str) -> VtzooError:
    return Corrupt(
        f"{digest[:12]}… from {remote.where} has another digest ({why})",
        "what came is kept in .vtzoo/quarantine; try again, or ask who keeps that zoo",
    )

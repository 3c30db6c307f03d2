"""Content-addressed files of a zoo: hashed while they are written under a unique name, read-only, renamed to their sha256.

    ROOT/.vtzoo/incoming/<unique>             on the way in; what a killed program left there is swept up by `vtzoo gc`
    ROOT/.vtzoo/objects/sha256/ab/<64 hex>    in place: whole, for a name is given only to bytes that have it

An object's modification time is when its content was last stored, so that what somebody is about to publish looks young.
"""

import hashlib
import io
import os
import re
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from vtzoo.errors import Conflict, VtzooError
from vtzoo.files import reading, sha256, sync_folder, synced, writing
from vtzoo.refs import check_contained, check_digest, check_way

MODE = 0o444
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


def shelf(root: Path) -> Path:
    """The folder of all objects of a zoo."""
    return root / ".vtzoo" / "objects" / "sha256"


def hall(root: Path) -> Path:
    """The folder of files that are on their way in."""
    return root / ".vtzoo" / "incoming"


def place(root: Path, digest: str) -> Path:
    """Where the object with this sha256 stands, if the zoo holds it.

    Raises:
        UsageError: not 64 hex digits.
    """
    return shelf(root) / check_digest(digest)[:2] / digest


def contained(root: Path, digest: str) -> Path:
    """Likewise, in the zoo's own folder.

    Raises:
        Corrupt: a link leads out of it, or there is no ordinary file.
        UsageError: likewise.
    """
    return check_contained(place(root, digest), root)


def held(root: Path) -> Generator[tuple[str, os.stat_result], None, None]:
    """Every object in place: digest, and what the system says of the file."""
    for folder in _scan(shelf(root)):
        if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
            for entry in _scan(Path(folder.path)):
                if _DIGEST.fullmatch(entry.name) and entry.name.startswith(folder.name):
                    with suppress(FileNotFoundError):  # removed by someone else since
                        yield entry.name, entry.stat(follow_symlinks=False)


@contextmanager
def arriving(root: Path) -> Generator[Path, None, None]:
    """Give the unique name of a file to be written in the hall; it is gone afterwards, unless it was adopted."""
    path = check_contained(hall(root) / f"{secrets.token_hex(8)}.tmp", root)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        with suppress(OSError):  # never in the way of the error that led here
            path.unlink()


@contextmanager
def workroom(root: Path) -> Generator[Path, None, None]:
    """Give a folder on the zoo's own disk that is gone afterwards; what a killed program left there goes with `vtzoo gc`."""
    from tempfile import TemporaryDirectory

    with writing(hall(root)):
        hall(root).mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=hall(root), ignore_cleanup_errors=True)
    with folder as path:
        yield Path(path)


def store(root: Path, source: str | Path | bytes) -> tuple[str, bool]:
    """Store a file or bytes under their sha256, and say whether that is new here; a damaged object is written anew.

    Raises:
        NotFound: no such file.
        Conflict: the file changed while it was read.
        Resources: the disk is full.
    """
    with arriving(root) as path:
        digest = _take(source, path)
        there = place(root, digest)
        if whole(there, digest) and renewed(there):
            return digest, False
        adopt(root, path, digest)
        return digest, True


def adopt(root: Path, source: Path, digest: str) -> None:
    """Move a file that was written and synced on the zoo's own disk to its place under its sha256, read-only."""
    path = contained(root, digest)
    with writing(path):
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        source.chmod(MODE)
        source.replace(path)
        sync_folder(path.parent)


def drop(root: Path, digests: Iterable[str]) -> None:
    """Delete objects; those that are gone already are no error.

    Raises:
        Corrupt: they would lie outside.
    """
    for digest in digests:
        path = place(root, digest)
        check_way(path, root)
        with writing(path), suppress(FileNotFoundError):
            if os.name == "nt":  # Windows deletes no read-only file
                path.chmod(0o644)
            path.unlink()


def whole(path: Path, digest: str) -> bool:
    """Whether an ordinary file is there and its bytes are those of its name."""
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(VtzooError, OSError):
        return sha256(path) == digest
    return False


def renewed(path: Path) -> bool:
    """Make an object look as young as one stored now; False where it has gone."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # someone else's file may be as old as it is
        pass
    return True


def _take(source: str | Path | bytes, path: Path) -> str:
    """Copy to a new file, synced; the digest of what was copied."""
    if isinstance(source, bytes):
        return _copy(io.BytesIO(source), path)
    source = Path(source)
    with reading(source), source.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = _copy(file, path)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Conflict(f"{source} changed while it was read", "repeat when nothing writes to it")
    return digest


def _copy(file: io.BufferedIOBase, path: Path) -> str:
    seen = hashlib.sha256()
    with synced(path) as copy:
        while chunk := file.read(_CHUNK_BYTES):
            seen.update(chunk)
            with writing(path):
                copy.write(chunk)
    return seen.hexdigest()


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda e: e.name)
    return []

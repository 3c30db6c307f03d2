"""Copies of a zoo's index for the day when it is lost: the last that was written here, and the one before.

A copy is never read or written through a link, which may lead out of a zoo that a stranger filled.
"""

from contextlib import suppress
from pathlib import Path

from vtzoo.errors import VtzooError
from vtzoo.files import atomic_write, reading, sha256, sha256_bytes, writing


def copies(root: Path) -> list[Path]:
    """The copies that are there, the newest first."""
    return [path for path in _places(root) if path.is_file() and not path.is_symlink()]


def keep_copies(root: Path, before: bytes | None, after: bytes) -> None:
    """Keep an index's content, and what it was before; a disk that takes no copies is no error."""
    latest, previous = _places(root)
    with suppress(VtzooError, OSError):
        latest.parent.mkdir(parents=True, exist_ok=True)
        for link in filter(Path.is_symlink, (latest, previous)):
            link.unlink()
        if before is not None and latest.is_file() and sha256(latest) == sha256_bytes(before):
            latest.replace(previous)
        elif before is not None:  # changed by hand since
            _write(previous, before)
        _write(latest, after)


def put_aside(index: Path) -> Path:
    """Keep a damaged index beside itself under a name made of its content; gives where."""
    with reading(index):
        data = index.read_bytes()
    path = index.with_name(f"{index.name}.old-{sha256_bytes(data)[:8]}")
    with writing(path):
        path.unlink(missing_ok=True)  # it may be a link
    _write(path, data)
    return path


def _places(root: Path) -> tuple[Path, Path]:
    folder = root / ".vtzoo" / "index"
    return folder / "latest.yaml", folder / "previous.yaml"


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)

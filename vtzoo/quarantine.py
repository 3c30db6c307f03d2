"""Where bytes from elsewhere lie until they are verified: `.vtzoo/quarantine`, one file for each writer.

    <digest>.part                       at rest, for whoever goes on with it
    <digest>.<host>.<process>.<draw>    being written by that process

A file changes hands by being renamed, so that two processes never write the same one; what a killed process leaves is
taken over when that process is gone (of another machine: an hour after the last byte).
"""

import os
import platform
import secrets
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vtzoo.files import sha256_bytes, writing
from vtzoo.refs import check_digest

FOLDER = Path(".vtzoo", "quarantine")
_LEFT_S = 3600.0
_HOST = sha256_bytes(platform.node().encode())[:8]


@contextmanager
def claimed(root: Path, digest: str) -> Generator[Path, None, None]:
    """Give the file with what has come of an object so far, ours alone; what is left of it in the end lies at rest."""
    folder = root / FOLDER
    mine = folder / f"{check_digest(digest)}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}"
    with writing(mine):
        folder.mkdir(parents=True, exist_ok=True)
    if not _take_over(folder, digest, mine):
        with writing(mine):
            mine.touch(exist_ok=False)
    try:
        yield mine
    finally:
        with suppress(OSError):  # never in the way of the error that led here
            _rest(mine, folder / f"{digest}.part")


def come(root: Path, digest: str) -> int:
    """How many bytes of an object have come before and can be gone on with."""
    return max((_size(p) for p in _left(root / FOLDER, digest)), default=0)


def _take_over(folder: Path, digest: str, mine: Path) -> bool:
    """Rename the longest file that nobody writes; of several who try, one succeeds."""
    for path in sorted(_left(folder, digest), key=_size, reverse=True):
        with suppress(OSError):
            path.rename(mine)
            return True
    return False


def _left(folder: Path, digest: str) -> list[Path]:
    return [path for path in folder.glob(f"{digest}.*") if _abandoned(path) and _is_own(path)]


def _abandoned(path: Path) -> bool:
    name = path.name.split(".")
    if name[1:] == ["part"]:
        return True
    if len(name) != 4 or not name[2].isdecimal():
        return False
    if name[1] == _HOST:
        return not _alive(int(name[2]))
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _LEFT_S
    return False


def _is_own(path: Path) -> bool:
    """Whether it is a file of the zoo's alone: what is written to a link goes where the link leads."""
    with suppress(OSError):
        facts = path.lstat()
        return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1
    return False


def _alive(process: int) -> bool:
    """Whether a process of this machine runs; on Windows its open file can't be renamed, which says the same."""
    if os.name == "nt":
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _rest(mine: Path, place: Path) -> None:
    """Leave the longer one of this file and one that rests there already."""
    if not mine.exists():
        return
    if _size(mine) <= _size(place):
        mine.unlink()
    else:
        mine.replace(place)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

"""The one who changes a zoo's index: whoever made the file `.vtzoo/writer`, which is made only if it isn't there.

Network file systems keep to that where their `flock` says yes to everyone. The mark of a process that died on this
machine is taken over at once, and after a moment one that says nothing: its maker died between making and writing it.
"""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vtzoo.errors import Conflict
from vtzoo.files import writing
from vtzoo.refs import check_contained

_POLL_S = 0.01
_SILENT_S = 2.0


@contextmanager
def writer(root: Path, wait_s: float) -> Generator[None, None, None]:
    """Be the one; wait so long for another.

    Raises:
        Conflict: another process still is.
        VtzooError: the disk takes no files.
    """
    from filelock import SoftFileLock, Timeout

    path = check_contained(root / ".vtzoo" / "writer", root)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = SoftFileLock(path, poll_interval=_POLL_S)
        try:
            _acquire(lock, path, wait_s)
        except Timeout as error:
            holder = f"process {lock.pid}" if lock.pid else "another program"
            said = f"{root} is being written by {holder} (waited {wait_s:g} s)"
            raise Conflict(said, f"wait until it is done; if it no longer runs anywhere: rm {path}") from error
    try:
        yield
    finally:
        try:
            lock.release()
        except OSError:  # what was to be done is done: a mark that can't be taken away now goes with this process
            with suppress(OSError):
                path.unlink()


def _acquire(lock: Any, path: Path, wait_s: float) -> None:
    from filelock import Timeout

    silent = _silent(path)
    try:
        lock.acquire(timeout=min(wait_s, _SILENT_S))
    except Timeout:
        if wait_s <= _SILENT_S:
            raise
        if silent and silent == _silent(path):  # it wrote nothing in all that time
            path.unlink(missing_ok=True)
        lock.acquire(timeout=wait_s - _SILENT_S)


def _silent(path: Path) -> int:
    """Which file an empty mark is (its inode); 0 where there is none, or it says whose it is."""
    try:
        facts = path.stat()
    except OSError:
        return 0
    return 0 if facts.st_size else facts.st_ino

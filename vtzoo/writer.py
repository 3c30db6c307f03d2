"""The one who changes a zoo's index: whoever made the file `.vtzoo/writer`, which is made only if it isn't there.

Network file systems keep to that where their `flock` says yes to everyone. The mark of a process that died on this
machine is taken over at once.
"""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vtzoo.errors import Conflict
from vtzoo.files import writing
from vtzoo.refs import check_contained

_POLL_S = 0.01


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
        lock = SoftFileLock(path, timeout=wait_s, poll_interval=_POLL_S)
        try:
            lock.acquire()
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

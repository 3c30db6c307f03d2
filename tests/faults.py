"""Break a job at its n-th change of the disk: kill the process there, or let the system refuse, or write only half.

A boundary is each call that changes the disk: opening a file for writing, every `write` that reaches the system, fsync,
rename, unlink, mkdir, rmdir, chmod, utime; also those that a library makes through `os`. The job runs in a forked process that shares what is imported already.
"""

import builtins
import errno
import io
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any, Literal

from vtzoo.errors import VtzooError

Fault = Literal["kill", "ENOSPC", "EIO", "short"]
FAULTS: tuple[Fault, ...] = ("kill", "ENOSPC", "EIO", "short")
DONE, REFUSED, CRASHED = 0, 1, 2
_CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "chmod", "utime", "fsync", "link")


class Boundaries:
    """Counts changes of the disk, and lets the fault happen at the n-th (from 1; 0: never)."""

    def __init__(self, at: int, fault: Fault) -> None:
        self.at, self.fault, self.count, self.armed = at, fault, 0, True

    def reached(self) -> bool:
        """Count one; whether it is the one."""
        self.count += self.armed
        return self.armed and self.count == self.at

    def strike(self) -> None:
        """What happens there."""
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault != "short":
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))


def broken(job: Callable[[Boundaries], object], at: int, fault: Fault) -> tuple[int, bool]:
    """Run a job in a process of its own with the fault at its n-th change of the disk.

    Returns:
        How it ended (DONE, REFUSED with one of our errors, CRASHED with another one, or minus the signal that killed it),
        and whether the job got as far as the fault.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            os.close(reading)
            boundaries = Boundaries(at, fault)
            _install(boundaries, writing)
            status = _run(job, boundaries)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        reached = bool(pipe.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, reached


def _run(job: Callable[[Boundaries], object], boundaries: Boundaries) -> int:
    try:
        job(boundaries)
    except VtzooError:
        return REFUSED
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
        return CRASHED
    return DONE


def _install(boundaries: Boundaries, pipe: int) -> None:
    say = os.write

    def check() -> bool:
        hit = boundaries.reached()
        if hit:
            say(pipe, b"1")
        return hit

    for name in _CHANGES:
        setattr(os, name, _watched(getattr(os, name), check, boundaries))
    _watch_descriptors(check, boundaries)
    _watch_files(check, boundaries)


def _watch_descriptors(check: Callable[[], bool], boundaries: Boundaries) -> None:
    real_open, real_write = os.open, os.write

    def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and check():
            boundaries.strike()
        return real_open(path, flags, *args, **more)

    def written(file: int, data: Any) -> int:
        if check():
            boundaries.strike()
            return real_write(file, data[: max(1, len(data) // 2)])
        return real_write(file, data)

    os.open, os.write = opened, written


def _watch_files(check: Callable[[], bool], boundaries: Boundaries) -> None:
    real = io.open

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if not check():
                return super().write(data)
            view = memoryview(data).cast("B")
            if boundaries.fault in ("kill", "short"):
                super().write(view[: max(1, len(view) // 2)])
            boundaries.strike()
            return max(1, len(view) // 2)

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not set(mode) & set("wxa+") or "b" not in mode or isinstance(file, int) or "opener" in more:
            return real(file, mode, *args, **more)
        if check():
            boundaries.strike()
        raw = Raw(file, mode.replace("b", ""))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    io.open = builtins.open = opened


def _watched(real: Callable[..., Any], check: Callable[[], bool], boundaries: Boundaries) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        if check():
            boundaries.strike()
        return real(*args, **more)

    return call

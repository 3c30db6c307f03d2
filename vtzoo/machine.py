"""What the machine has left, what the process took of it, and who was started beside it."""

import os
import platform
import shutil
import sys
from pathlib import Path

from vtzoo.files import writing

OFFLINE = ("VTZOO_OFFLINE", "HF_HUB_OFFLINE")
"""Variables of the environment that say so; the second is the hub's own."""


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, or of the place where it will be, has left."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system doesn't say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes() -> int:
    """How many were started together by torchrun or accelerate launch; 1 where this one was started alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def first() -> bool:
    """Whether this is the process that speaks for all."""
    return processes() == 1 or int(os.environ.get("RANK") or 0) == 0


def told() -> str:
    """What numbers may depend on beside versions: system, architecture, processors and Python, in a line."""
    return f"{platform.system()} {platform.machine()}, {processors()} processors, Python {platform.python_version()}"


def offline() -> bool:
    """Whether the user keeps this process off the network: by `--offline`, VTZOO_OFFLINE or HF_HUB_OFFLINE."""
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in OFFLINE)


def check_writable(folder: Path, file: Path | None = None) -> None:
    """Refuse a folder that takes no file, before hours are spent on what is to go there; it is made where it is missing.

    Args:
        folder: where.
        file: what is to go there, for the message.

    Raises:
        VtzooError: what the system says.
    """
    import tempfile

    with writing(file or folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as tried:
            tried.write(bytes(4096))

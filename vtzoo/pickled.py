"""Pickled checkpoints (.pth, .pt, .bin, .ckpt) as safetensors files, for those who say so: reading a pickle may run code.

A process of its own unpickles (`vtzoo.unpickle`): tensors alone, within limits of memory, time and disk, without this process' environment. It
writes safetensors, which are then read as any stranger's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vtzoo import strict
from vtzoo.errors import Corrupt, Mismatch, Resources
from vtzoo.files import reading

SUFFIXES = frozenset((".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle"))
SECONDS, SECONDS_PER_GB = 120, 120
"""How long a process may take, and more for large files."""
_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6)))
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "HOME")
_KINDS = {4: Corrupt, 7: Resources}


def is_pickled(path: Path) -> bool:
    """Whether a file is a pickle, or torch's archive of one, by its first bytes or its suffix."""
    with reading(path), path.open("rb") as file:
        start = file.read(9)
    headed = start[8:9] == b"{"  # of safetensors, whose length may look like a pickle's start
    return not headed and (start.startswith(_STARTS) or path.suffix.lower() in SUFFIXES)


@contextmanager
def unpickled(path: Path, *, allowed: bool) -> Generator[Path]:
    """Give the safetensors file that a pickled checkpoint becomes, for as long as the block lasts; any other file as it is.

    Args:
        path: the checkpoint.
        allowed: whether the user said `--from-pickle`.

    Raises:
        NotFound: no such file.
        Mismatch: it is a pickle, and nobody said that it may be read.
        Corrupt: it holds something else than tensors, or is damaged.
        Resources: it takes too much memory, time or disk.
    """
    if not is_pickled(path):
        yield path
        return
    if not allowed:
        said = f"{path} is a pickle, which may run code when it is read"
        raise Mismatch(said, "save it as safetensors, or, if you trust where it is from, add --from-pickle")
    with TemporaryDirectory() as folder:
        made = Path(folder) / "model.safetensors"
        _convert(path.absolute(), made)
        yield made


def _convert(path: Path, made: Path) -> None:
    environment = {k: os.environ[k] for k in _PASSED if k in os.environ} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONNOUSERSITE": "1",
    }
    limit_s = SECONDS + SECONDS_PER_GB * path.stat().st_size / 1e9
    line = [sys.executable, "-m", "vtzoo.unpickle", str(path), str(made), str(int(limit_s))]
    try:
        ran = subprocess.run(  # noqa: S603 - our own module
            line,
            cwd=made.parent,
            env=environment,
            capture_output=True,
            timeout=limit_s + 30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise Resources(f"reading {path} took longer than {limit_s:.0f} s", "save it as safetensors") from error
    if ran.returncode == 0 and made.is_file():
        return
    try:
        said = str(strict.record(ran.stdout)["said"])[:200]
    except (ValueError, KeyError):
        said = f"the process that read it ended with {ran.returncode}"
    raise _KINDS.get(ran.returncode, Resources)(
        f"{path} was not read: {said}", "save it as safetensors where it was made"
    )


def report(said: str) -> str:
    """What the process writes for `_convert` to read."""
    return json.dumps({"said": said})

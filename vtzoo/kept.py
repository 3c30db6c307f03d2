"""Files that are computed once: named by all that decides their content, written whole or not at all, checked when they are opened.

Of several processes that want the same file one computes it; the others wait and read. A CRC-32 over the numbers tells a damaged file,
which is computed again.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtzoo import files, talk
from vtzoo.errors import Corrupt
from vtzoo.tensors import TensorFile, write

CHECK = "crc32"
UNCHECKED = frozenset({CHECK, "seconds"})


def place(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The file of what these facts decide."""
    return folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.safetensors"


def kept(folder: Path, facts: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that `facts` decide, mapped from their file; made first where it is missing or damaged.

    Raises:
        Corrupt: what was made is not finite.
        Resources: the disk is full.
    """
    path = place(folder, facts)
    if not sound(path):
        with alone(path):
            if not sound(path):  # nobody has computed it meanwhile
                if path.exists():
                    talk.say(f"{path} is damaged: it is computed again")
                made = make()
                check = torch.tensor([_crc(dict(made))])
                write(path, {**made, CHECK: check}, {"vtzoo": json.dumps(facts, sort_keys=True)})
    found = mapped(path)
    found.pop(CHECK)
    return found


def sound(path: Path) -> bool:
    """Whether a file is there and whole."""
    if path.exists():
        with suppress(Corrupt, KeyError):
            found = mapped(path)
            return _crc(found) == int(found[CHECK])
    return False


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read where they are looked at."""
    file = TensorFile(path)
    every = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)  # keeps no file open
    found: dict[str, Tensor] = {}
    for name, span in file.header.tensors.items():
        data = every[file.header.data_start + span.start : file.header.data_start + span.end]
        found[name] = data.view(file.dtype(name)).view(file.shape(name))
    return found


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Let only one of several runs compute a file; the others find it when they get in."""
    from filelock import FileLock

    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with FileLock(lock):
        for left in path.parent.glob(f".{path.name[:24]}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps what somebody has open
                lock.unlink()


def _crc(tensors: Mapping[str, Tensor]) -> int:
    """Over all numbers by name."""
    crc = 0
    for name in sorted(set(tensors) - UNCHECKED):
        crc = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc

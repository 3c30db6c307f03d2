"""The process that reads a pickled checkpoint: `python -m vtzoo.unpickle FROM TO SECONDS`; `vtzoo.pickled` starts it.

torch's restricted unpickler (weights_only; sound since torch 2.6, see CVE-2025-32434) makes tensors, lists, dictionaries and numbers, and refuses to look
anything else up. Should it fail, limits still hold where the system knows them: of memory, time, the size of a file, further processes.
"""

import pickle
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtzoo.errors import Corrupt, Resources, VtzooError
from vtzoo.pickled import report
from vtzoo.tensors import CODES, write

PLACES = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
"""Where checkpoints of timm and others keep the weights, in the order of preference."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
SLACK_BYTES = 512 << 20
"""Memory for torch itself, beside three times the file."""


def main(source: Path, target: Path, seconds: int) -> None:
    """Convert one file within limits.

    Raises:
        Corrupt: it holds something else than tensors by name.
        Resources: it takes more than it may.
    """
    size_bytes = source.stat().st_size
    _limit(size_bytes, seconds)
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Corrupt(_reason(error), "") from None
    except MemoryError:
        raise Resources("it takes more memory than its size would", "") from None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError) as error:
        raise Corrupt(f"it is damaged ({' '.join(str(error).split())[:120]})", "") from None
    tensors = _tensors(found)
    _check(tensors, size_bytes)
    write(target, tensors, {"format": "pt"})


def _tensors(found: Any) -> dict[str, Tensor]:
    """The tensors by name, taken out of a checkpoint, without the "module." of a model that was trained in parallel."""
    if isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        found = next((found[key] for key in PLACES if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise Corrupt("it holds no tensors by name", "")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Corrupt(f"'{str(name)[:80]}' is no tensor", "")
    parallel = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if parallel else name: value for name, value in found.items()}


def _check(tensors: Mapping[str, Tensor], size_bytes: int) -> None:
    """Refuse what has no plain form, and few bytes that stand for very many."""
    for name, value in tensors.items():
        if (
            value.layout != torch.strided
            or value.is_quantized
            or value.dtype not in CODES
            or value.device.type != "cpu"
        ):
            raise Corrupt(f"'{name[:80]}' is no plain tensor", "")
    claimed = sum(value.numel() * value.dtype.itemsize for value in tensors.values())
    if claimed > 4 * size_bytes + (1 << 20):
        raise Corrupt(f"its tensors have {claimed} bytes, the file {size_bytes}", "")


def _limit(size_bytes: int, seconds: int) -> None:
    """Bound memory, time, files and further processes, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the time is bounded from outside
        return
    bounds = {"RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 4 * size_bytes + (16 << 20), "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        bounds["RLIMIT_AS"] = pages * resource.getpagesize() + 3 * size_bytes + SLACK_BYTES
    for name, bound in bounds.items():
        with suppress(OSError, ValueError):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            least = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            resource.setrlimit(kind, (least, least))


def _reason(error: BaseException) -> str:
    """What torch says of a pickle, without its advice to read it all the same."""
    looked_up = _GLOBAL.search(str(error))
    return f"it would look up {looked_up[1]}" if looked_up else "torch's reader of plain tensors refuses it"


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except VtzooError as refusal:
        sys.stdout.write(report(refusal.message))
        sys.exit(refusal.exit_code)
    except MemoryError:
        sys.stdout.write(report("it takes more memory than its size would"))
        sys.exit(Resources.exit_code)

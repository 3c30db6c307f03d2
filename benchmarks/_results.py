"""What a benchmark leaves behind: results/NAME.json, from which `make docs` writes the page of measurements."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def keep(about: str, run: str, head: Sequence[str], rows: Sequence[Sequence[str]], raw: Any) -> None:
    """Put one run's table beside the other runs of this benchmark, with what is needed to repeat it.

    Args:
        about: the benchmark's docstring; its first line becomes the title.
        run: names the run among others; an earlier one of this name is replaced.
        head: of the table's columns.
        rows: of text.
        raw: every figure, unrounded.
    """
    script = Path(sys.argv[0])
    path = FOLDER / f"{script.stem.removeprefix('bench_')}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    known["about"] = about.strip().splitlines()[0]
    known["runs"][run] = {
        "command": shlex.join(["python", f"benchmarks/{script.name}", *map(_shown, sys.argv[1:])]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "head": list(head),
        "rows": [list(row) for row in rows],
        "raw": raw,
    }
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _shown(argument: str) -> str:
    """A path of this machine by its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def machine() -> str:
    """Processor, cores, the widest instructions that torch uses there, and the versions: what decides the figures."""
    import timm
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    kind = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{model}, {kind}, torch {torch.__version__}, timm {timm.__version__}"

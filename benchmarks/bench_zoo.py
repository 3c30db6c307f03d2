"""A zoo of many entries: listing it, showing one, adding one, and the same on a small zoo.

Every command is a whole process, as a person starts it; the median of several runs, in seconds. The entries are facts as
`vtzoo train` writes them, each with an object of its own.
"""

import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import keep

from vtzoo.catalogue import INDEX, Index, dump
from vtzoo.files import atomic_text, safetensors_header
from vtzoo.zoo import Zoo

HEAD = ("entries", "index, MB", "ls", "ls --json", "show", "add one", "ls, index changed by hand")


def filled(root: Path, count: int) -> Zoo:
    """A zoo with that many deltas; the objects are small, the index is as large as real ones are."""
    zoo = Zoo.init(root)
    index, head = Index(), safetensors_header([("x", "I32", (1,))], {"vtzoo": "{}"})
    for i in range(count):
        digest = zoo.add_object(head + struct.pack("<I", i))
        index.sections["deltas"][f"task-{i % 100}/lora-{i:05d}"] = {
            "backbone": "vit_embedded_64", "command": f"vtzoo train --name task-{i % 100}/lora-{i:05d} --method 'lora[rank=8]' --data images",
            "cpu_seconds": 254.6, "created": "2026-11-29T20:37:34Z", "digest": digest, "fingerprint": f"sha256:{'5' * 64}", "method": "lora[rank=8]",
            "metrics": {"top1": round(0.5 + i / 3 % 0.5, 4)}, "peak_bytes": 1550176256, "seconds": 129.2, "size_bytes": 2491024, "tasks": [f"task-{i % 100}"],
        }  # fmt: skip
    atomic_text(root / INDEX, dump(index))
    return zoo


def timed(command: list[str], zoo: Path, runs: int) -> float:
    """Median seconds of a command."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "vtzoo_cli", "--zoo", str(zoo), *command], check=True, stdout=subprocess.DEVNULL
        )
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def adding(zoo: Path, runs: int) -> float:
    """Median seconds of a process that stores one object and publishes one entry."""
    code = "import sys; from vtzoo.zoo import Zoo; z = Zoo(sys.argv[1]); z.put('deltas', sys.argv[2], {'digest': z.add_object(sys.argv[2].encode())})"
    found = []
    for run in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(zoo), f"added/{run}-{time.time_ns()}"], check=True)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def by_hand(zoo: Path, runs: int) -> float:
    """Median seconds of `ls` after somebody else changed the index: the file must be read as YAML again."""
    path, found = zoo / INDEX, []
    text = path.read_text()
    for run in range(runs):
        path.write_text(f"# {run} {time.time_ns()}\n{text}")
        found.append(timed(["ls"], zoo, 1))
    path.write_text(text)
    return statistics.median(found)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    for count in asked.entries:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            zoo = Path(folder, "zoo")
            filled(zoo, count)
            one = f"task-{(count - 1) % 100}/lora-{count - 1:05d}"
            timed(["ls"], zoo, 1)
            found = [timed(command, zoo, asked.runs) for command in (["ls"], ["ls", "--json"], ["show", one])]
            found += [adding(zoo, asked.runs), by_hand(zoo, 3)]
            raw[str(count)] = found
            rows.append((f"{count:,}", f"{(zoo / INDEX).stat().st_size / 1e6:.2f}", *(f"{s:.2f}" for s in found)))
            print(rows[-1], flush=True)
    keep(__doc__ or "", "seconds of whole processes", HEAD, rows, raw)


if __name__ == "__main__":
    main()

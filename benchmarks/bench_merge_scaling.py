"""How time and memory of a merge grow with the number of tasks and with the size of the backbone.

    python benchmarks/bench_merge_scaling.py [--arch vit_small_patch16_224 …] [--tasks 2 …] [METHOD …]

The checkpoints are those of bench_merge_speed.py, in a temporary folder, and so is what is measured, once for each row: `vtzoo merge` as a
process of its own. GB are those of the backbone and the deltas, each of which is read at least once; where they are more than the
machine's memory, they come from the disk. Rows that results/merge_scaling.json has are measured again, the others stay.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _results import FOLDER, keep
from bench_merge_speed import files, measured

HEAD = ("backbone", "tasks", "merge", "GB", "wall, s", "user, s", "peak memory, MB", "anonymous, MB", "wall, s a GB")
ARCHS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
TASKS = (2, 8, 20)
METHODS = ("linear", "ties", "iso-c")
KEPT = FOLDER / "merge_scaling.json"
RUN = "2 to 20 tasks"


def rows_of(raw: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, by size, number of tasks and merge."""
    found: list[tuple[str, ...]] = []
    for arch, tasks, method in sorted((k.split("|") for k in raw), key=lambda k: (ARCHS.index(k[0]), int(k[1]), k[2])):
        own = raw[f"{arch}|{tasks}|{method}"]
        memory = (f"{own['peak']:.0f}", f"{own['anonymous']:.0f}")
        seconds = (f"{own['wall']:.1f}", f"{own['user']:.1f}")
        found.append((arch, tasks, method, f"{own['gb']:.2f}", *seconds, *memory, f"{own['wall'] / own['gb']:.1f}"))
    return found


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--tasks", action="append", type=int)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=[])
    asked = parser.parse_args()
    raw: dict[str, Any] = json.loads(KEPT.read_text())["runs"][RUN]["raw"] if KEPT.is_file() else {}
    for arch in asked.arch or ARCHS:
        with tempfile.TemporaryDirectory() as name:
            most = max(asked.tasks or TASKS)
            base, paths, zoo = files(Path(name), arch, most, keep=False)
            command = [str(Path(sys.executable).parent / "vtzoo"), "--zoo", str(zoo.root)]
            for tasks in asked.tasks or TASKS:
                size = sum(p.stat().st_size for p in (base, *paths[:tasks])) / 1e9
                refs = [f"t{i}" for i in range(tasks)]
                for method in asked.methods or METHODS:
                    own = measured([*command, "merge", *refs, "--method", method, "--name", "made/one"])
                    subprocess.run([*command, "rm", "made/one"], check=True, capture_output=True)
                    raw[f"{arch}|{tasks}|{method}"] = {**own, "gb": size}
                    print(" | ".join((arch, str(tasks), method, str(own))), flush=True)
                    keep(__doc__ or "", RUN, HEAD, rows_of(raw), raw)


if __name__ == "__main__":
    main()

"""How fast checkpoints are merged, beside mergekit's `mergekit-pytorch`, in turns on the same files.

    python benchmarks/bench_merge_speed.py [--mergekit PATH] [--arch vit_base_patch16_224] [--tasks 8] [--runs 5] [METHOD …]

Random checkpoints of a timm network (float32, the base and 1e-3 of noise) lie in a temporary folder. Each program is a process
of its own that starts from nothing; the files are in the page cache. Given are the medians of wall time and of user time,
the highest resident memory, and the part of it that is no file's (anonymous), read from the system every 10 ms. The last
row reads all files and writes as many bytes as the result has: copying. Without mergekit (a virtual environment of its own has it:
`pip install mergekit`) its rows are left out. Adds to results/merge_speed.json.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from _results import keep
from safetensors.torch import save_file

from vtzoo.verbs.add import add_backbone, add_delta
from vtzoo.zoo import Zoo

HEAD = (
    "method",
    "program",
    "wall, s",
    "user, s",
    "peak memory, MB",
    "anonymous, MB",
    "wall / mergekit's",
    "peak / mergekit's",
    "anonymous / mergekit's",
    "wall / copying",
)
METHODS = ("linear", "task-arithmetic", "ties", "iso-c", "tsv")
COPY = "import sys\nfor p in sys.argv[2:]:\n    f = open(p, 'rb', 0)\n    while b := f.read(1 << 20): pass\nopen(sys.argv[1], 'wb').write(bytes(f.tell()))"


def files(folder: Path, arch: str, count: int, *, keep: bool = True) -> tuple[Path, list[Path], Zoo]:
    """The base, the checkpoints, and a zoo that has both; without `keep` the zoo's own files alone."""
    torch.manual_seed(0)
    base = {n: t.clone() for n, t in timm.create_model(arch, num_classes=0).state_dict().items()}
    save_file(base, folder / "base.safetensors")
    zoo = Zoo.init(folder / "zoo")
    add_backbone(name="base", arch=arch, weights=folder / "base.safetensors", zoo=zoo)
    found: list[Path] = []
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        path = folder / f"t{i}.safetensors"
        save_file({n: t + 1e-3 * torch.randn(t.shape, generator=draw) for n, t in base.items()}, path)
        add_delta(name=f"t{i}", backbone="base", weights=path, zoo=zoo)
        if not keep:
            path.unlink()
        found.append(path if keep else zoo.object(zoo.resolve(f"t{i}", "deltas").digest))
    return folder / "base.safetensors", found, zoo


def mergekits(method: str, base: Path, paths: Sequence[Path]) -> dict[str, Any] | None:
    """The same merge as mergekit wants it told; None for those it lacks."""
    options: dict[str, dict[str, Any]] = {
        "linear": {"merge_method": "linear"},
        "task-arithmetic": {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"lambda": 0.3}},
        "ties": {"merge_method": "ties", "base_model": str(base), "parameters": {"density": 0.2}},
    }
    if method not in options:
        return None
    models = [{"model": str(p), "parameters": {"weight": 1.0}} for p in paths]
    return {**options[method], "models": models, "dtype": "float32"}


def measured(command: Sequence[str]) -> dict[str, float]:
    """Run a program: seconds, and the most memory it held, in MB."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = {"VmHWM": 0, "RssAnon": 0}  # not the kernel's ru_maxrss, which counts what the parent held at the fork
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            lines = []
        for what, value in (line.split(":") for line in lines if line.startswith(tuple(seen))):
            seen[what] = max(seen[what], int(value.split()[0]))
        time.sleep(0.01)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {child.stderr.read() if child.stderr else ''}")
    return {"wall": wall, "user": usage.ru_utime, "peak": seen["VmHWM"] / 1024, "anonymous": seen["RssAnon"] / 1024}


def programs(
    method: str, asked: argparse.Namespace, folder: Path, base: Path, paths: Sequence[Path]
) -> dict[str, list[str]]:
    """What is run, by name."""
    refs = [p.stem for p in paths]
    vtzoo = [
        str(Path(sys.executable).parent / "vtzoo"),
        "--zoo",
        str(folder / "zoo"),
        "merge",
        *refs,
        "--method",
        method,
    ]
    found = {"vtzoo": [*vtzoo, "--name", "made/one"]}
    config = mergekits(method, base, paths)
    if asked.mergekit and config:
        (folder / "merge.yml").write_text(yaml.safe_dump(config))
        found["mergekit"] = [str(asked.mergekit), str(folder / "merge.yml"), str(folder / "out")]
    return found


def compare(method: str, asked: argparse.Namespace, folder: Path, base: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """All runs of a method, the programs in turns."""
    todo = programs(method, asked, folder, base, paths)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in todo}
    for _ in range(asked.runs):
        for name, command in todo.items():
            runs[name].append(measured(command))
            subprocess.run(
                [todo["vtzoo"][0], "--zoo", str(folder / "zoo"), "rm", "made/one"], check=False, capture_output=True
            )
            shutil.rmtree(folder / "out", ignore_errors=True)
            print(f"{method} | {name} | {runs[name][-1]}", flush=True)
    return runs


def middle(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of wall and user time, and the highest memory."""
    medians = {k: statistics.median(r[k] for r in runs) for k in ("wall", "user")}
    return medians | {k: max(r[k] for r in runs) for k in ("peak", "anonymous")}


def row(method: str, name: str, runs: dict[str, list[dict[str, float]]], copied: float) -> tuple[str, ...]:
    """One line of the table."""
    own = middle(runs[name])
    theirs = middle(runs["mergekit"]) if "mergekit" in runs and name != "mergekit" else {}
    ratios = [f"{own[k] / theirs[k]:.2f}" if theirs else "" for k in ("wall", "peak", "anonymous")]
    shown = (f"{own['wall']:.1f}", f"{own['user']:.1f}", f"{own['peak']:.0f}", f"{own['anonymous']:.0f}")
    return (method, name, *shown, *ratios, f"{own['wall'] / copied:.1f}")


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--arch", default="vit_base_patch16_224")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=[])
    asked = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, paths, _ = files(folder, asked.arch, asked.tasks)
        raw = {m: compare(m, asked, folder, base, paths) for m in asked.methods or METHODS}
        copied = [
            measured([sys.executable, "-c", COPY, str(folder / "copy"), *map(str, (base, *paths))])
            for _ in range(asked.runs)
        ]
    once = middle(copied)["wall"]
    for method, runs in raw.items():
        rows += [row(method, program, runs, once) for program in runs]
    rows.append(row("read and write", "python", {"python": copied}, once))
    which = f": {', '.join(asked.methods)}" if asked.methods else ""
    keep(__doc__ or "", f"{asked.tasks} x {asked.arch}{which}", HEAD, rows, {**raw, "copy": copied})
    for line in rows:
        print(" | ".join(line))


if __name__ == "__main__":
    main()

"""Types the command line of each case in a folder of its own, in this one process, and writes what came of it as JSON, one line a case.

python tests/hostile/run.py light|heavy|pickled FOLDER [CASE]
"""

import contextlib
import importlib
import io
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

from vtzoo_cli._main import main

SOUND = "vtzoo_was_here"


def peak_bytes() -> int:
    """The most memory that this process held since it was last asked; since its start where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seen = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(seen.split()[1]) * 1024


def held_bytes() -> int:
    """What it holds now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else 0


def listing(folder: Path) -> dict[str, str]:
    """Everything in a folder, with what would tell a change."""
    return {
        str(p.relative_to(folder)): f"{p.lstat().st_mtime_ns} {p.lstat().st_mode}" for p in sorted(folder.rglob("*"))
    }


def one(folder: Path, case: object) -> dict[str, object]:
    """Run a case beside a canary."""
    here, canary = folder / "here", folder / "canary"
    here.mkdir(parents=True)
    canary.mkdir()
    (canary / "x").write_text("x")
    os.chdir(here)
    words = case.make(here)  # type: ignore[attr-defined]
    before, out, err = listing(folder), io.StringIO(), io.StringIO()
    held, start = held_bytes(), time.perf_counter()
    peak_bytes()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: int | str = main(words)
    except BaseException:  # noqa: BLE001 - a bug, to be told
        code = traceback.format_exc()
    peak, seconds = peak_bytes(), time.perf_counter() - start
    outside = {k: v for k, v in listing(folder).items() if not k.startswith("here")}
    same = outside == {k: v for k, v in before.items() if not k.startswith("here")}
    return {"code": code, "err": err.getvalue(), "peak": peak, "more": peak - held, "seconds": seconds, "same": same, "left": [k for k in listing(here) if ".tmp" in k], "sprung": (here / SOUND).exists()}  # fmt: skip


def run(kind: str, folder: Path, only: str = "") -> None:
    """Run all cases of a kind."""
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder)
    cases = importlib.import_module(f"tests.hostile.{kind}").CASES
    for i, (name, case) in enumerate(cases.items()):
        if only in name:
            print(json.dumps({"name": name, "wanted": case.code, **one(folder / str(i), case)}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

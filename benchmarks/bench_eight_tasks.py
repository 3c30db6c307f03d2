"""How methods stand to each other on eight small tasks: accuracy against numbers trained, memory and time.

    python benchmarks/bench_eight_tasks.py IMAGES --weights vit_small_patch14_dinov2.safetensors --zoo DIR [--jobs 2] [--no-times]

IMAGES has a folder for each task of eight_tasks/sweep.yaml. The sweep goes on wherever it was stopped; start it again as you like.
Top-1 is on at most 300 test images a task, after the last epoch. Time and memory are measured apart: one training of each method on
`clothing`, in a process of its own, with nothing beside it. Leave the machine alone meanwhile, or put it off with --no-times. Writes
eight_tasks/results.jsonl, results/eight_tasks.json and the page docs/reference/eight-tasks.html.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _results import keep

from vtzoo import rows, talk
from vtzoo.standings import Standing
from vtzoo.sweep_file import Sweep, read
from vtzoo.sweep_report import save
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.sweep import sweep
from vtzoo.vtab import BENCH, PUBLISHED
from vtzoo.zoo import Zoo

HERE = Path(__file__).parent
SPEC = HERE / "eight_tasks" / "sweep.yaml"
ROWS = HERE / "eight_tasks" / "results.jsonl"
PAGE = HERE.parent / "docs" / "reference" / "eight-tasks.html"
ARCH, TIMED, SEED = "vit_small_patch14_dinov2.lvd142m", "clothing", 100
COST = ("seconds", "peak_bytes")
HEAD = ("method", "mean top-1, %", "± 95 %", "mean rank", "PPT", "numbers trained", "of them the head's", "memory, MB", "time, s", "on the front of", "VTAB-1k, published", "place here", "place there")  # fmt: skip


def timed(spec: Sweep, zoo: Zoo) -> dict[tuple[str, str], dict[str, Any]]:
    """Time and memory of each method on each backbone, by one run with a seed of its own."""
    cells = {(c.backbone, c.method): replace(c, seed=SEED) for c in spec.cells if c.task == TIMED}
    made = sweep(spec=replace(spec, name=f"{spec.name}-times", cells=tuple(cells.values())), zoo=zoo, jobs=1)
    return {(r["backbone"], r["spec"]): {k: r[k] for k in COST} for r in made.report["rows"]}


def published(s: Standing) -> float | None:
    """A method's mean over VTAB-1k's tasks with a ViT-B, by the study that has most of these methods, else by another."""
    known = {source: tasks for tasks, _, source in PUBLISHED.get(s.method.partition("[")[0], ())}
    return known.get(BENCH, next(iter(known.values()), None))


def places(own: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Of those who have a published number: their places here by the mean, and there."""
    known = [(s, there) for s in own if (there := published(s)) is not None]
    here = sorted(known, key=lambda k: -k[0].mean)
    there = sorted(known, key=lambda k: -k[1])
    return {k[0].label: (str(here.index(k) + 1), str(there.index(k) + 1)) for k in known}


def told(s: Standing, places: tuple[str, str]) -> tuple[str, ...]:
    """A line of the table."""
    known = published(s)
    fronts = ", ".join(f.removesuffix("_bytes").replace("peak", "memory").replace("seconds", "time") for f in s.fronts)
    return (
        s.label, f"{100 * s.mean:.1f}", "" if s.half is None else f"{100 * s.half:.1f}", "" if s.rank is None else f"{s.rank:.1f}",
        f"{s.ppt:.3f}", f"{s.trained:,}", f"{s.trained - s.params:,}", "" if s.peak_bytes is None else f"{s.peak_bytes / 1e6:,.0f}",
        "" if s.seconds is None else f"{s.seconds:.1f}", fronts, "" if known is None else f"{known:.1f}", *places,
    )  # fmt: skip


def main() -> None:
    """Train what isn't trained, measure, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-times", action="store_true")
    asked = parser.parse_args()
    talk.install(lambda text: print(text, flush=True), lambda items, _label, _total: items)
    os.environ["IMAGES"] = str(asked.images.absolute())
    zoo = Zoo.init(asked.zoo, exist_ok=True)
    if "vit_small" not in {entry.name for entry in zoo.entries("backbones")}:
        add_backbone(name="vit_small", arch=ARCH, weights=asked.weights, zoo=zoo)
    spec = read(SPEC.read_text(encoding="utf-8"), SPEC.name)
    found = sweep(spec=spec, zoo=zoo, jobs=asked.jobs).report["rows"]
    costs = {} if asked.no_times else timed(spec, zoo)
    unknown = dict.fromkeys(COST)
    own = [{k: v for k, v in r.items() if k not in (*rows.MEASURED, "data")} for r in found]
    own = [{**r, **costs.get((r["backbone"], r["spec"]), unknown)} for r in own]
    rows.write(ROWS, own)
    for path in (PAGE, PAGE.with_suffix(".json")):
        path.unlink(missing_ok=True)
    stood = save(PAGE, "Eight tasks", own)
    PAGE.with_suffix(".json").unlink()  # the rows are kept already
    for backbone in dict.fromkeys(s.backbone for s in stood):
        mine = [s for s in stood if s.backbone == backbone]
        order = places(mine)
        keep(
            __doc__ or "",
            f"{backbone}, {len(mine[0].by_task)} tasks, {mine[0].seeds} seeds",
            HEAD,
            [told(s, order.get(s.label, ("", ""))) for s in mine],
            {},
        )


if __name__ == "__main__":
    main()

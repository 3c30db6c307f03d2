"""Three deltas made by three methods, merged by each algorithm.

    python benchmarks/bench_merge.py [--backbone REF] [--pixels 112] [--epochs 10] [--lr LR] [--head-lr LR] [METHOD=DATA …]

Each task's top-1 on its test images: alone, in every merge, and of the bare backbone with the same head (a merge whose
factors are all zero). Scales are chosen on the validation images, the sum over the tasks. Adds to results/merge.json.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _results import keep

from vtzoo import data as D
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

DEFAULT = ("lora=vtzoo:fashion", "ssf=vtzoo:emoji", "bitfit=vtzoo:clipart")
BARE = "bare backbone, same heads"
ALGORITHMS = {
    "linear": ("linear",),
    "task-arithmetic": tuple(f"task-arithmetic[scale={s}]" for s in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)),
    "ties": tuple(f"ties[density={d},scale={s}]" for d in (0.2, 0.5) for s in (0.3, 0.5, 0.7, 1.0)),
}


def scores(zoo: Zoo, ref: str, tasks: dict[str, str], split: D.Split) -> dict[str, float]:
    """Top-1 of one artifact on each task."""
    return {
        task: evaluate(ref=ref, data=data, task=task, zoo=zoo, split=split).metrics[task]["top1"]
        for task, data in tasks.items()
    }


def table(zoo: Zoo, asked: argparse.Namespace) -> dict[str, Any]:
    """Train, merge, measure."""
    recipe = {"epochs": asked.epochs, "image_size": asked.pixels, "lr": asked.lr, "head_lr": asked.head_lr}
    recipe = {k: v for k, v in recipe.items() if v is not None}
    pairs = [item.partition("=")[::2] for item in asked.deltas or DEFAULT]
    tasks = {Path(data).name.removeprefix("vtzoo:"): data for _, data in pairs}
    found: dict[str, Any] = {"methods": dict(zip(tasks, (m for m, _ in pairs), strict=True)), "recipe": recipe}
    refs: list[str] = []
    alone: dict[str, float] = {}
    for task, (method, data) in zip(tasks, pairs, strict=True):
        made = train(backbone=asked.backbone, data=data, method=method, name=f"{task}/{method}", zoo=zoo, recipe=recipe)
        refs.append(made.ref)
        alone[task] = made.metrics["test"]["top1"]
    show("alone", alone)
    merge_refs(refs=refs, method="task-arithmetic", name="bare", layers="*:0", zoo=zoo)
    bare = scores(zoo, "bare", tasks, "test")
    show(BARE, bare)
    found["rows"] = {"alone": alone, BARE: bare}
    for algorithm, specs in ALGORITHMS.items():
        names = {f"merged/{algorithm}-{i}": spec for i, spec in enumerate(specs)}
        for name, spec in names.items():
            merge_refs(refs=refs, method=spec, name=name, zoo=zoo)
        best = max(names, key=lambda name: sum(scores(zoo, name, tasks, "val").values()))
        found["rows"][names[best]] = scores(zoo, best, tasks, "test")
        show(names[best], found["rows"][names[best]])
    return found


def show(label: str, row: dict[str, float]) -> None:
    """One line of the table."""
    print(f"{label:34}" + "  ".join(f"{task} {score:.3f}" for task, score in row.items()), flush=True)


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--head-lr", type=float)
    parser.add_argument("deltas", nargs="*")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = table(Zoo.init(Path(folder) / "zoo"), asked)
    tasks = list(found["methods"])
    rows = [[label, *(f"{scores[task]:.3f}" for task in tasks)] for label, scores in found["rows"].items()]
    head = ["", *(f"{task} ({method})" for task, method in found["methods"].items())]
    keep(__doc__ or "", f"{asked.backbone}, {asked.pixels} px, {asked.epochs} epochs", head, rows, found)


if __name__ == "__main__":
    main()

"""Deltas beside a linear probe and full fine-tuning, at equal epochs and equal preprocessing.

    python benchmarks/bench_tuning.py                                     the embedded backbones on the embedded tasks
    python benchmarks/bench_tuning.py --arch ARCH [--weights FILE] [--method lora] [--seeds 3] [--pixels 112] [--precision bf16] DATA …

Each DATA is a folder train|val|test/CLASS/*, or vtzoo:NAME; of its training images 1,000 are used, drawn anew by seed. The
probe (three seeds) has its learning rate chosen on the validation images for each seed; the delta (three seeds) and full
fine-tuning (one) run at the package's defaults. Top-1 is on the test images. Adds its rows to results/tuning.json.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _probe import probed
from _results import keep

from vtzoo import data as D
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card, sized
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

HEAD = ("task", "method", "trained numbers", "test top-1, mean", "by seed", "learning rate")
SEEDS, IMAGES, EPOCHS = 3, 1000, 10
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DEFAULT = (("tf_efficientnet_lite0", "lora", 64), ("vit_embedded_64", "lora", 64))


def rows(zoo: Zoo, backbone: str, data: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything about one backbone on one task."""
    runs: dict[str, list[dict[str, Any]]] = {"linear, swept": linear(zoo, backbone, data, asked)}
    recipe = {"epochs": EPOCHS, "image_size": asked.pixels, "precision": asked.precision, "limit": IMAGES}
    todo = {asked.method: asked.seeds} if asked.skip_full else {"full": 1, asked.method: asked.seeds}
    for method, seeds in todo.items():
        for seed in range(seeds):
            name = f"{Path(data).name.removeprefix('vtzoo:')}/{method.partition('[')[0]}-{seed}"
            made = train(
                backbone=backbone, data=data, method=method, name=name, zoo=zoo, recipe={**recipe, "seed": seed}
            )
            row = {"seed": seed, "lr": made.recipe["lr"], "test": made.metrics["test"]["top1"]}
            row |= {"seconds": made.metrics["seconds"], "params": made.params, "val": made.metrics["val"]["top1"]}
            runs.setdefault(method, []).append(row)
            print(f"{data} {method} seed {seed}: {row['test']:.3f} ({row['seconds']:.0f} s)", flush=True)
    heads, deltas = ([r["test"] for r in runs[m]] for m in ("linear, swept", asked.method))
    mean, best, ours = statistics.fmean(heads), max(heads), statistics.fmean(deltas)
    print(f"{data} {asked.method} mean {ours:.3f}; probe mean {mean:.3f}, best {best:.3f}", flush=True)
    return {"epochs": EPOCHS, "images": IMAGES, "runs": runs, "over_mean": ours - mean, "over_best_seed": ours - best}


def linear(zoo: Zoo, backbone: str, data: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The probe, with the features computed once."""
    card, args = sized(resolved_card(backbone, zoo), asked.pixels)
    heads = probed(
        build_card(card, zoo=zoo, **args), card.preprocess, data, limit=IMAGES, seeds=SEEDS, lrs=LRS, epochs=EPOCHS,
        bf16=asked.precision == "bf16",
    )  # fmt: skip
    print(f"{data} linear: " + ", ".join(f"{h.test:.3f} (lr {h.lr:g})" for h in heads), flush=True)
    return [asdict(h) for h in heads]


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of the method")
    parser.add_argument("--skip-full", action="store_true")
    parser.add_argument("data", nargs="*")
    return parser.parse_args()


def main() -> None:
    """Run and keep."""
    asked = parsed()
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        if asked.weights:
            add_backbone(name="measured", arch=asked.arch, weights=asked.weights, zoo=zoo)
        if asked.arch:
            todo = [(asked.arch, "measured" if asked.weights else asked.arch, asked.method, asked.pixels, asked.data)]
        else:
            embedded = [f"vtzoo:{name}" for name in D.embedded_tasks()]
            todo = [(name, name, method, pixels, embedded) for name, method, pixels in DEFAULT]
        for arch, backbone, method, pixels, sources in todo:
            found: dict[str, Any] = {}
            for data in sources:
                asked.method, asked.pixels = method, pixels
                found[data] = rows(zoo, backbone, data, asked)
                shown = f"{arch}, {method}, {pixels} px, {asked.precision}"
                keep(__doc__ or "", shown, HEAD, [row for task in found for row in table(task, found[task])], found)


def table(data: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of one task."""
    lines: list[tuple[str, ...]] = []
    for method, runs in found["runs"].items():
        scores, rates = [r["test"] for r in runs], sorted({r["lr"] for r in runs})
        shown = (
            f"{statistics.fmean(scores):.3f}",
            " ".join(f"{s:.3f}" for s in scores),
            " ".join(f"{r:g}" for r in rates),
        )
        lines.append((Path(data).name.removeprefix("vtzoo:"), method, f"{runs[0]['params']:,}", *shown))
    return lines


if __name__ == "__main__":
    main()

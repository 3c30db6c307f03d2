"""Few images of each class on a dual encoder: what each way to tune it makes of 1 to 16 of them, beside zero-shot.

    python benchmarks/bench_few_shot.py CLIP TASK [TASK …] [--seeds 0,1,2] [--shots 1,2,4,8,16] [--methods NAME,…]

CLIP is an open_clip folder such as `scripts/make_clip.py` makes, the tasks are folders of held-out categories beside it. Each cell is the
mean over seeds, which choose the images and the first values; the test images are looked at once. Writes results/few_shot.json and
docs/reference/few-shot.svg.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _results import FOLDER, keep

from vtzoo.verbs.add import add_published
from vtzoo.verbs.train import train
from vtzoo.verbs.zero_shot import zero_shot
from vtzoo.zoo import Zoo

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "a drawing of a {}."


@dataclass(frozen=True, kw_only=True)
class Way:
    """A stack of methods and its recipe; `epochs` gives the passes over so many images of each class."""

    spec: str
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    epochs: Callable[[int], int]


def coops(shots: int) -> int:
    """CoOp's: 50 for one image of a class, 100 for two and four, 200 for more."""
    return 50 if shots == 1 else 100 if shots <= 4 else 200


PLAIN = {"augment": "flip"}  # two views of an image, so that the image tower runs twice for each and no more
WAYS = {
    "coop": Way(spec="coop[init=a drawing of a]", recipe={"preset": "coop", **PLAIN}, epochs=coops),
    "clip-adapter": Way(spec="clip-adapter", recipe={"preset": "coop", **PLAIN}, epochs=coops),
    "clip-adapter-adamw": Way(spec="clip-adapter", recipe=PLAIN, epochs=coops),
    "task-residual": Way(spec="task-residual", recipe={"preset": "task-residual", **PLAIN}, epochs=coops),
    "tip-adapter-f": Way(spec="tip-adapter-f", recipe={"preset": "tip-adapter", **PLAIN}, epochs=lambda _: 20),
    "lora": Way(spec="lora[rank=2,targets=auto|text.auto]", recipe=PLAIN, epochs=lambda _: 20),
}


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shots", default="1,2,4,8,16")
    parser.add_argument("--methods", default=",".join(WAYS))
    parser.add_argument("--add", action="store_true", help="to what an earlier run of these tasks and seeds has found")
    asked = parser.parse_args()
    seeds, shots = ([int(n) for n in text.split(",")] for text in (asked.seeds, asked.shots))
    run = f"{', '.join(t.name for t in asked.tasks)}, seeds {asked.seeds}"
    raw: dict[str, Any] = known(run) if asked.add else {}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        add_published(name="clip", source=str(asked.clip), zoo=zoo)
        for task in asked.tasks:
            found = measured(zoo, task, asked.methods.split(","), shots, seeds)
            for what in ("scores", "seconds"):
                found[what] = {**raw.get(task.name, {}).get(what, {}), **found[what]}
            raw[task.name] = found
    rows = [row for task, found in raw.items() for row in table(task, found, shots)]
    head = (
        "task",
        "method",
        *(f"{n} shot{'s' * (n > 1)}" for n in shots),
        "seeds above zero-shot, most shots",
        "s a training",
    )
    keep(__doc__ or "", run, head, rows, raw)
    draw(raw, shots, ROOT / "docs" / "reference" / "few-shot.svg")


def known(run: str) -> dict[str, Any]:
    """What an earlier run of this name has found."""
    return json.loads((FOLDER / "few_shot.json").read_text())["runs"][run]["raw"]


def measured(zoo: Zoo, task: Path, names: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Top-1 on the test images by method, number of images and seed."""
    first = zero_shot(
        backbone="clip", data=str(task), name=f"{task.name}/zero-shot", templates=[TEMPLATE], zoo=zoo
    ).metrics["test"]
    found: dict[str, Any] = {"zero-shot": first["top1"], "images": first["images"], "scores": {}, "seconds": {}}
    print(f"{task.name} | zero-shot | {first['top1']:.3f}", flush=True)
    for name in names:
        for count in shots:
            started = time.perf_counter()
            scores = [once(zoo, task, name, count, seed) for seed in seeds]
            found["scores"].setdefault(name, {})[str(count)] = scores
            found["seconds"].setdefault(name, {})[str(count)] = (time.perf_counter() - started) / len(seeds)
            print(f"{task.name} | {name} | {count} | {' '.join(f'{s:.3f}' for s in scores)}", flush=True)
    return found


def once(zoo: Zoo, task: Path, name: str, shots: int, seed: int) -> float:
    """Top-1 of one training on the test images."""
    way = WAYS[name]
    made = train(
        backbone="clip", data=str(task), method=way.spec, name=f"{task.name}/{name}-{shots}-{seed}", zoo=zoo, templates=[TEMPLATE],
        recipe={**way.recipe, "epochs": way.epochs(shots), "shots": shots, "seed": seed, "eval_on": "test"},
    )  # fmt: skip
    return float(made.metrics["test"]["top1"])


def table(task: str, found: Mapping[str, Any], shots: Sequence[int]) -> list[tuple[str, ...]]:
    """Means and the spread over seeds, in percent."""
    zero = found["zero-shot"]
    rows = [(task, "zero-shot", *([f"{100 * zero:.1f}"] * len(shots)), "", "")]
    for name, scores in found["scores"].items():
        cells = [
            f"{100 * statistics.mean(own):.1f} ± {100 * statistics.pstdev(own):.1f}"
            for own in (scores[str(n)] for n in shots)
        ]
        won = sum(s > zero for s in scores[str(shots[-1])])
        rows.append(
            (
                task,
                name,
                *cells,
                f"{won} of {len(scores[str(shots[-1])])}",
                f"{found['seconds'][name][str(shots[-1])]:.0f}",
            )
        )
    return rows


def draw(raw: Mapping[str, Any], shots: Sequence[int], path: Path) -> None:
    """Top-1 over the number of images, a panel for each task."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vtzoo"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(raw), figsize=(5 * len(raw), 4), squeeze=False)
    for panel, (task, found) in zip(panels[0], raw.items(), strict=True):
        panel.axhline(100 * found["zero-shot"], color="grey", linestyle="--", label="zero-shot")
        for name, scores in found["scores"].items():
            own = [[100 * s for s in scores[str(n)]] for n in shots]
            panel.errorbar(
                shots,
                [statistics.mean(o) for o in own],
                [statistics.pstdev(o) for o in own],
                marker="o",
                capsize=3,
                label=name,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(shots), [str(n) for n in shots])
        panel.set(title=f"{task}: {found['images']} test images", xlabel="images of each class", ylabel="top-1, %")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

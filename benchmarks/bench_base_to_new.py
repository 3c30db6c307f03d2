"""Classes that a training has not seen, on a dual encoder: learned words beside zero-shot, on both halves of a task and on another task.

    python benchmarks/bench_base_to_new.py CLIP TASK OTHER [--seeds 0,1,2] [--shots 16]

CLIP is an open_clip folder such as `scripts/make_clip.py` makes, TASK and OTHER are folders of held-out categories beside it. Trained is on the first
half of TASK's classes; the other half, and all of OTHER's, are known by their names alone. Writes results/base_to_new.json.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _results import keep

from vtzoo.portions import harmonic
from vtzoo.verbs.add import add_published
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.train import train
from vtzoo.vocabulary import Naming
from vtzoo.zoo import Zoo

WORDS, TEMPLATE = "a drawing of a", "a drawing of a {}."
METHODS = ("coop", "kgcoop", "prograd", "cocoop")
HEAD = ("method", "base", "new", "harmonic mean", "other task")


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shots", type=int, default=16)
    asked = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        add_published(name="clip", source=str(asked.clip), zoo=zoo)
        found["zero-shot"] = [scores(zoo, "clip", asked.task, asked.other, Naming(templates=[TEMPLATE]))]
        for method in METHODS:
            for seed in map(int, asked.seeds.split(",")):
                name = f"task/{method}-{seed}"
                train(
                    backbone="clip", data=str(asked.task), method=f"{method}[init={WORDS}]", name=name, zoo=zoo, templates=[TEMPLATE],
                    recipe={
                        "preset": "coop", "augment": "flip", "epochs": 50, "shots": asked.shots, "seed": seed, "classes": "base",
                        "eval_on": "test",
                    },
                )  # fmt: skip
                found.setdefault(method, []).append(scores(zoo, name, asked.task, asked.other, None))
    rows = [row(method, own) for method, own in found.items()]
    for one in rows:
        print(" | ".join(one), flush=True)
    keep(__doc__ or "", f"{asked.task.name}, then {asked.other.name}, {asked.shots} shots", HEAD, rows, found)


def scores(zoo: Zoo, ref: str, task: Path, other: Path, naming: Naming | None) -> tuple[float, float, float]:
    """Top-1 on the test images of the classes that were trained on, of the others, and of another task."""
    halves: dict[str, Any] = evaluate(ref=ref, data=str(task), zoo=zoo, naming=naming, base_to_new=True).metrics
    beyond = evaluate(ref=ref, data=str(other), zoo=zoo, naming=naming or Naming()).metrics
    base, new = (own["top1"] for name, own in halves.items() if name != "harmonic mean")
    return base, new, next(iter(beyond.values()))["top1"]


def row(method: str, found: list[tuple[float, float, float]]) -> tuple[str, ...]:
    """Means and their spread over seeds, in percent."""
    columns = [
        [base for base, _, _ in found],
        [new for _, new, _ in found],
        [harmonic(b, n) for b, n, _ in found],
        [o for *_, o in found],
    ]
    spread = len(found) > 1
    cells = [
        f"{100 * statistics.mean(c):.1f}" + (f" ± {100 * statistics.pstdev(c):.1f}" if spread else "") for c in columns
    ]
    return method, *cells


if __name__ == "__main__":
    main()

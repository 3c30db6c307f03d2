"""Many linear probes in one pass beside one probe: the embedded backbone on an embedded task, all features kept before.

    python benchmarks/bench_probes.py [--data vtzoo:fashion] [--epochs 100] [--rounds 3]

Each is a whole call of `vtzoo.train`, from backbone and images to the stored delta, in turns; the steps alone stand beside it.
Writes results/probes.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import keep

from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

HEAD = ("probes", "whole call, s", "training, s", "training, to one probe's")
GRIDS = {1: (1, 1), 20: (10, 2), 200: (40, 5)}


def spec(rates: int, decays: int) -> str:
    """A grid of learning rates between 1e-4 and 1e-1 and of weight decays between 0 and 1e-2."""
    lrs = [1e-4 * 1000 ** (i / max(1, rates - 1)) for i in range(rates)]
    return f"linear[lr=[{','.join(f'{x:.4g}' for x in lrs)}],weight_decay=[{','.join(f'{1e-2 * i / 5:g}' for i in range(decays))}]]"


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="vtzoo:fashion")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[int, dict[str, list[Any]]] = {n: {"call": [], "training": []} for n in GRIDS}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        for turn in range(-1, asked.rounds):
            for count, grid in GRIDS.items():
                start = time.perf_counter()
                made = train(
                    backbone="vit_embedded_64", data=asked.data, method=spec(*grid), name=f"task/{count}-{turn}", zoo=zoo,
                    recipe={"epochs": asked.epochs},
                )  # fmt: skip
                if turn >= 0:  # the first turn computes the features
                    found[count]["call"].append(time.perf_counter() - start)
                    found[count]["training"].append(made.metrics["seconds"])
    one = statistics.median(found[1]["training"])
    rows = [
        (
            str(n),
            f"{statistics.median(f['call']):.1f}",
            f"{(own := statistics.median(f['training'])):.1f}",
            f"{own / one:.1f}",
        )
        for n, f in found.items()
    ]
    for row in rows:
        print(" | ".join(row), flush=True)
    keep(__doc__ or "", f"{asked.data.removeprefix('vtzoo:')}, {asked.epochs} epochs", HEAD, rows, found)


if __name__ == "__main__":
    main()

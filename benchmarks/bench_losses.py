"""Distillation losses beside their references: torchdistill's, or the papers' formulas in plain loops.

    python benchmarks/bench_losses.py [DRAWS]

Each draw has shapes of its own: 3 to 6 images, 3 to 9 classes, features and maps of unequal widths and heights. Shown is the largest difference
of all draws: the value's, relative to the reference's, and the gradients' of all that the student gives, relative to the largest entry; computed in
float64, and in float32 against a reference in float64. Writes results/losses.json.
"""

import sys
from pathlib import Path

import torch
from _results import keep

sys.path.append(str(Path(__file__).parent.parent))  # the references are the tests'

from tests.parity.loss_references import CASES, differences

HEAD = ("loss", "reference", "value", "gradient", "value, float32", "gradient, float32")


def main() -> None:
    """Run and keep."""
    torch.set_num_threads(1)
    draws = int(sys.argv[1]) if sys.argv[1:] else 100
    rows, raw = [], []
    for case in CASES:
        found = [
            max(column)
            for dtype in (torch.float64, torch.float32)
            for column in zip(*(differences(case, seed, dtype) for seed in range(draws)), strict=True)
        ]
        rows.append((f"`{case.spec}`", case.reference, *(f"{d:.0e}" for d in found)))
        raw.append({"loss": case.spec, "reference": case.reference, "differences": found})
        print("  ".join(rows[-1]), flush=True)
    keep(__doc__ or "", f"{draws} draws", HEAD, rows, raw)


if __name__ == "__main__":
    main()

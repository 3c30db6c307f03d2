"""How long the spectral merges take beside the same merges by LAPACK's SVD, and how far the results are apart.

    python benchmarks/bench_merge_spectral.py [--arch vit_base_patch16_224] [--tasks 8] [iso-c|tsv|iso-cts|cart …]

The checkpoints are those of bench_merge_speed.py, and so is what is measured: wall and user time of a process of its own, its peak
memory, and the part of it that is no file's. `LAPACK` is the same program with `torch.linalg.svd` (float64, gesdd) in the place of
vtzoo's, which takes the eigenvectors of the smaller Gram matrix. Apart are the largest difference of an entry, as a share of the largest
change that LAPACK's merge makes to the tensor, the worst tensor of all; and the L2 norm of all differences over that of all changes.
Adds to results/merge_spectral.json.
"""

import argparse
import importlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _results import keep
from safetensors import safe_open
from torch import Tensor

from vtzoo.merges import _spectral
from vtzoo.verbs.merge import merge_refs
from vtzoo.zoo import Zoo

HEAD = (
    "merge", "SVD", "wall, s", "user, s", "peak memory, MB", "anonymous, MB", "wall / LAPACK's", "largest difference", "norm of differences",
)  # fmt: skip
METHODS = ("iso-c", "tsv", "iso-cts", "cart")  # each is one file that takes all its SVDs from `_spectral`
PROGRAMS = ("vtzoo", "LAPACK")


def lapack(matrix: Tensor, most: int | None = None, right: Tensor | None = None) -> _spectral.SVD:
    """As `vtzoo.merges._spectral.svd`, by LAPACK."""
    left, values, across = torch.linalg.svd(matrix if right is None else matrix @ right, full_matrices=False)
    rank = int((values > 1e-5 * values[0]).sum())
    rank = rank if most is None else min(rank, most)
    return left[:, :rank], values[:rank], across[:rank]


def one(zoo: Path, method: str, program: str, refs: list[str]) -> None:
    """What a process of its own does."""
    if program == "LAPACK":
        _spectral.svd = lapack
        importlib.import_module(f"vtzoo.merges.{method.replace('-', '_')}").svd = lapack  # type: ignore[attr-defined] - in its place
    merge_refs(refs=refs, method=method, name=f"made/{method}-{program.lower()}", zoo=Zoo(zoo))


def apart(zoo: Zoo, method: str, base: Path) -> tuple[float, float]:
    """How far the two merges are apart: the worst tensor's largest entry, and all in norm."""
    names = [f"made/{method}-{p.lower()}" for p in PROGRAMS]
    paths = [zoo.object(zoo.resolve(n, "deltas").digest) for n in names]
    worst, differ, change = 0.0, 0.0, 0.0
    with safe_open(base, "pt") as before, safe_open(paths[0], "pt") as ours, safe_open(paths[1], "pt") as theirs:
        for place in ours.keys():  # noqa: SIM118 - no mapping
            module, _, param = place.rpartition(".")
            start = before.get_tensor(f"{module.rpartition('.')[0]}.{param}".lstrip(".")).double()
            a, b = (f.get_tensor(place).double() - start for f in (ours, theirs))
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-45)))
            differ += float((a - b).square().sum())
            change += float(b.square().sum())
    return worst, math.sqrt(differ / change)


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_base_patch16_224")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=[])
    asked = parser.parse_args()
    if strange := set(asked.methods) - set(METHODS):
        parser.error(f"{', '.join(sorted(strange))}: choose from {', '.join(METHODS)}")
    if asked.one:
        zoo, method, program, *refs = asked.one
        one(Path(zoo), method, program, refs)
        return
    from bench_merge_speed import files, measured  # not in the processes that are measured: it loads timm

    rows: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, paths, zoo = files(folder, asked.arch, asked.tasks)
        for method in asked.methods or METHODS[:2]:
            command = [sys.executable, __file__, "--one", str(folder / "zoo"), method]
            runs = {p: measured([*command, p, *(x.stem for x in paths)]) for p in PROGRAMS}
            worst, norm = apart(zoo, method, base)
            raw[method] = {**runs, "largest": worst, "norm": norm}
            for program, own in runs.items():
                ours = program == "vtzoo"
                shown = (f"{own['wall']:.1f}", f"{own['user']:.1f}", f"{own['peak']:.0f}", f"{own['anonymous']:.0f}")
                ratio = f"{own['wall'] / runs['LAPACK']['wall']:.2f}" if ours else ""
                rows.append(
                    (method, program, *shown, ratio, f"{worst:.1e}" if ours else "", f"{norm:.1e}" if ours else "")
                )
                print(" | ".join(rows[-1]), flush=True)
    keep(__doc__ or "", f"{asked.tasks} x {asked.arch}", HEAD, rows, raw)


if __name__ == "__main__":
    main()

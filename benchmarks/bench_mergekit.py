"""The same merges by mergekit and by vtzoo: how far the results are apart.

    python benchmarks/bench_mergekit.py --mergekit PATH [--arch vit_small_patch16_224] [--tasks 4]

Random checkpoints of a timm network (float32, the base and 1e-3 of noise) lie in a temporary folder. Given is the largest difference
of any entry over the largest change that the merge makes, and how many entries differ by more than a thousandth of that change: TIES
keeps a share of the entries, and the two round its number differently. `mergekit-pytorch` stands in a virtual environment of its own
(`pip install mergekit`). Adds to results/mergekit.json.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from _results import keep
from bench_merge_speed import files, mergekits
from safetensors.torch import load_file
from torch import Tensor

from vtzoo.delta import Delta
from vtzoo.folding import fold
from vtzoo.verbs.merge import merge_refs
from vtzoo.zoo import Zoo

HEAD = ("merge", "mergekit's", "largest difference", "entries further apart", "entries")
PAIRS = {
    "linear": "linear",
    "task-arithmetic": "task-arithmetic[scale=0.3]",
    "ties": "ties[density=0.2,scope=tensor]",
    "slerp": "slerp[t=0.3]",
}


def asked_of_mergekit(method: str, base: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """The merge as mergekit wants it told."""
    if method != "slerp":
        return mergekits(method, base, paths) or {}
    models = [{"model": str(p)} for p in paths[:2]]
    return {
        "merge_method": "slerp",
        "base_model": str(paths[0]),
        "models": models,
        "parameters": {"t": 0.3},
        "dtype": "float32",
    }


def ours(spec: str, paths: Sequence[Path], base: Mapping[str, Tensor], zoo: Zoo) -> Mapping[str, Tensor]:
    """The merged network."""
    refs = [p.stem for p in paths][: 2 if spec.startswith("slerp") else None]
    name = f"made/{spec.partition('[')[0]}"
    return fold(base, Delta.open(merge_refs(refs=refs, method=spec, name=name, zoo=zoo).path), task="", check=False)


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--tasks", type=int, default=4)
    asked = parser.parse_args()
    rows, raw = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, paths, zoo = files(folder, asked.arch, asked.tasks)
        base = load_file(path)
        for method, spec in PAIRS.items():
            (folder / "merge.yml").write_text(yaml.safe_dump(asked_of_mergekit(method, path, paths)))
            out = folder / f"out-{method}"
            subprocess.run([asked.mergekit, folder / "merge.yml", out], check=True, capture_output=True)
            theirs, mine = load_file(next(out.glob("*.safetensors"))), ours(spec, paths, base, zoo)
            change = max(float((theirs[n] - base[n]).abs().max()) for n in base)
            gaps = {n: (theirs[n] - mine[n]).abs() for n in base}
            found = {
                "largest": max(float(g.max()) for g in gaps.values()) / change,
                "apart": sum(int((g > 1e-3 * change).sum()) for g in gaps.values()),
                "entries": sum(g.numel() for g in gaps.values()),
            }
            raw[method] = found
            rows.append((spec, method, f"{found['largest']:.1e}", str(found["apart"]), str(found["entries"])))
            print(" | ".join(rows[-1]), flush=True)
    keep(__doc__ or "", f"{asked.tasks} x {asked.arch}", HEAD, rows, raw)


if __name__ == "__main__":
    main()

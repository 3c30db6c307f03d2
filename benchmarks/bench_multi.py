"""What one ONNX file for many tasks is worth: its size and time beside a file for each task.

    python benchmarks/bench_multi.py [--weights DIR --images DIR]

Four tasks, each with another method, on one backbone: trained for a moment, exported by `--multi-task`, and each by itself. A mixed batch
of 8 (each task twice, in random order) runs through the one file; its images, task by task, through the four. The third row is the other way to
one file, in which each task's images have the whole network to themselves, with the backbone's tensors kept once. Differences are
from each task's own network in torch, one image at a time, relative to the largest logit.

Without options this is the embedded ViT with embedded tasks; `--weights` has vit_small_patch14_dinov2.safetensors (at 112 pixels), `--images`
the tasks' folders. Memory is what a process that does nothing else has more of after loading and running.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _results import keep

from vtzoo import mixing
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.tasks import export_tasks
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

METHODS = {"clothing": "lora", "blood-cells": "ssf", "sign-digits": "adaptformer", "emoji": "vpt-deep"}
EMBEDDED = {"fashion": "lora", "blood": "ssf", "clipart": "adaptformer", "emoji": "vpt-deep"}
RECIPE = {"epochs": 1, "limit": 60, "eval_limit": 20, "batch_size": 20}
HEAD = ("backbone", "how", "MB", "mixed batch of 8, ms", "memory, MB", "max difference")
ALONE = """
import resource, sys
import numpy as np
import onnxruntime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
sessions = [onnxruntime.InferenceSession(p, options, providers=["CPUExecutionProvider"]) for p in sys.argv[2:]]
pixels = int(sys.argv[1])
for session in sessions:
    count = 8 // len(sessions)
    feed = {"image": np.zeros((count, 3, pixels, pixels), np.float32)}
    if len(session.get_inputs()) > 1:
        feed["task_id"] = np.arange(count) % 4
    session.run(None, feed)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


def memory(pixels: int, *files: Path) -> float:
    """Megabytes that sessions of these files take in a process of their own."""
    command = [sys.executable, "-c", ALONE, str(pixels), *map(str, files)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rows(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One file, a file for each task, and one file with a network for each."""
    zoo, name, pixels, methods = Zoo.init(folder / "zoo"), "vit_embedded_64", 64, EMBEDDED
    if asked.weights:
        name, pixels, methods = "vit_small_patch14_dinov2", 112, METHODS
        add_backbone(name=name, arch=name, weights=asked.weights / f"{name}.safetensors", zoo=zoo)
    for task, method in methods.items():
        data = str(asked.images / task) if asked.images else f"vtzoo:{task}"
        train(backbone=name, data=data, method=method, name=f"{task}/{method}", zoo=zoo, recipe={**RECIPE, "image_size": pixels})  # fmt: skip
    refs = [f"{t}/{m}" for t, m in methods.items()]
    one, apart, singles = folder / "one.onnx", folder / "apart.onnx", [folder / f"{i}.onnx" for i in range(len(refs))]
    mixed = export_tasks(refs=refs, out=one, compare=True, zoo=zoo).report
    with patch.object(mixing, "_ways", lambda *_: ([""], {})):
        whole = export_tasks(refs=refs, out=apart, zoo=zoo).report
    worst = max(export_onnx(ref=r, out=o, zoo=zoo).report["max_rel"] for r, o in zip(refs, singles, strict=True))
    several = {
        "size_bytes": mixed["single_files_size_bytes"],
        "onnxruntime_ms": mixed["single_files_onnxruntime_ms"],
        "max_rel": worst,
    }
    found = {
        "one file": (mixed, [one]),
        "a file for each task": (several, singles),
        "one file, a network for each task": (whole, [apart]),
    }
    return [
        {"backbone": name, "pixels": pixels, "how": how, "memory_mb": memory(pixels, *files), **said}
        for how, (said, files) in found.items()
    ]


def shown(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        f"{row['backbone']}, {row['pixels']} px", row["how"], f"{row['size_bytes'] / 1e6:.1f}", f"{row['onnxruntime_ms']:.1f}",
        f"{row['memory_mb']:.0f}", f"{row['max_rel']:.1e}",
    ]  # fmt: skip


def main() -> None:
    """Print the rows and keep them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, help="a folder with vit_small_patch14_dinov2.safetensors")
    parser.add_argument("--images", type=Path, help="the folder of the tasks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = rows(asked, Path(folder))
    print(" | ".join(HEAD))
    for row in found:
        print(" | ".join(shown(row)))
    threads = torch.get_num_threads()
    run = f"{found[0]['backbone']}, {threads} thread{'s' * (threads > 1)}"
    keep(__doc__ or "", run, HEAD, [shown(row) for row in found], found)


if __name__ == "__main__":
    main()

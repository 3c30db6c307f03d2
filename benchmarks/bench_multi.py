"""What one ONNX file for many tasks is worth: its size, time and memory beside a file for each task.

    python benchmarks/bench_multi.py [--weights DIR --images DIR]

Four tasks, each with another method, on one backbone: trained for a moment, exported by `--multi-task`, and each by itself. A mixed batch
of 8 (each task twice, in random order) runs through the one file; its images, task by task, through the four. The third row is another way to
one file: each task's images have the whole network to themselves, with the backbone's tensors kept once. The last row is what can't
be beaten: the file of one task (lora, folded: the bare backbone) with all 8 images. The rows take turns, so that what else the machine does meets
all alike. Differences are from each task's own network in torch, one image at a time, relative to the largest logit. Memory is what a
process that does nothing else holds more after it has loaded the files and run them.

Without options this is the embedded ViT with embedded tasks; `--weights` has vit_small_patch14_dinov2.safetensors (at 112 pixels), `--images`
the tasks' folders.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import keep
from torch import Tensor, nn

from vtzoo.artifact import go_live, open_ref
from vtzoo.by_rows import by_rows
from vtzoo.onnx.describe import PAD
from vtzoo.onnx.mixtures import alone, mixtures, of, together
from vtzoo.onnx.run import Runtime, latencies, session
from vtzoo.onnx.seal import seal
from vtzoo.onnx.tasks import convert_tasks
from vtzoo.spec import Preprocess
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.tasks import export_tasks
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

TASKS = {"clothing": "clothing", "blood-cells": "blood-cells", "sign-digits": "sign-digits", "emoji": "emoji"}
EMBEDDED = {"fashion": "vtzoo:fashion", "clipart": "vtzoo:clipart", "emoji": "vtzoo:emoji", "again": "vtzoo:emoji"}
METHODS = ("lora", "ssf", "adaptformer", "vpt-deep")
RECIPE = {"epochs": 1, "limit": 60, "eval_limit": 20, "batch_size": 20}
HEAD = ("backbone", "how", "MB", "mixed batch of 8, ms", "memory, MB", "max difference")
ALONE = """
import re, sys
import numpy as np
import onnxruntime

def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3

before = held()
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
print(held() - before)
"""


def memory(pixels: int, files: Sequence[Path]) -> float:
    """Megabytes that sessions of these files take in a process of their own (Linux)."""
    command = [sys.executable, "-c", ALONE, str(pixels), *map(str, files)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Apart(nn.Module):
    """A network for each task, which only that task's images go through."""

    def __init__(self, models: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.models, self.classes = nn.ModuleList(models), classes

    def forward(self, image: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """As `vtzoo.mixing.Mixed`."""
        order = torch.cat(list(rows))
        y = by_rows(list(self.models), image.index_select(0, order), [r.shape[0] for r in rows], self.classes, PAD)
        return y.new_full((image.shape[0], y.shape[1]), torch.nan).index_copy(0, order, y)


def networks(refs: Sequence[str], out: Path, pixels: int, zoo: Zoo) -> float:
    """Write one file with a network for each task; gives the largest relative difference."""
    lives = [go_live(open_ref(ref, zoo)) for ref in refs]
    shape = lives[0].preprocess
    batches = mixtures(shape, len(lives))
    wanted = {i: alone(live.model, of(batches, i)) for i, live in enumerate(lives)}
    network = Apart([live.model for live in lives], max(y.shape[1] for y in wanted.values()))
    content = seal(convert_tasks(network, (3, pixels, pixels), len(lives)), {})
    out.write_bytes(content)
    found = together(Runtime(session(content), shape, embedded=False), batches, wanted)
    return max(d.max_rel for d in found.values())


def rows(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One file, a file for each task, one file with a network for each, and what can't be beaten."""
    zoo, name, pixels, tasks = Zoo.init(folder / "zoo"), "vit_embedded_64", 64, EMBEDDED
    if asked.weights:
        name, pixels = "vit_small_patch14_dinov2", 112
        tasks = {task: str(asked.images / where) for task, where in TASKS.items()}
        add_backbone(name=name, arch=name, weights=asked.weights / f"{name}.safetensors", zoo=zoo)
    refs = [f"{task}/{method}" for task, method in zip(tasks, METHODS, strict=True)]
    for ref, data, method in zip(refs, tasks.values(), METHODS, strict=True):
        train(backbone=name, data=data, method=method, name=ref, zoo=zoo, recipe={**RECIPE, "image_size": pixels})
    one, apart, singles = folder / "one.onnx", folder / "apart.onnx", [folder / f"{i}.onnx" for i in range(len(refs))]
    mixed = export_tasks(refs=refs, out=one, zoo=zoo).report["max_rel"]
    whole = networks(refs, apart, pixels, zoo)
    worst = [export_onnx(ref=r, out=o, zoo=zoo).report["max_rel"] for r, o in zip(refs, singles, strict=True)]
    found = {
        "one file": ([one], mixed), "a file for each task": (singles, max(worst)), "one file, a network for each task": ([apart], whole),
        "one task alone": (singles[:1], worst[0]),
    }  # fmt: skip
    times = latencies(*(_run(files, pixels) for files, _ in found.values()))
    return [
        {
            "backbone": name, "pixels": pixels, "how": how, "onnxruntime_ms": time, "memory_mb": memory(pixels, files),
            "size_bytes": sum(f.stat().st_size for f in files), "max_rel": far,
        }
        for (how, (files, far)), time in zip(found.items(), times, strict=True)
    ]  # fmt: skip


def _run(files: Sequence[Path], pixels: int) -> Callable[[], object]:
    """The batch through one file, or each task's part of it through its own."""
    shape = Preprocess(input_size=(3, pixels, pixels))
    batch = mixtures(shape, len(METHODS))[-1]
    sessions = [session(f) for f in files]
    opened = [Runtime(s, shape, embedded=False) for s in sessions]
    if len(files) == 1:
        many = len(sessions[0].get_inputs()) > 1
        return opened[0].bare(batch.images, batch.tasks if many else None)
    runs = [r.bare(batch.images[batch.tasks == i]) for i, r in enumerate(opened)]
    return lambda: [run() for run in runs]


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

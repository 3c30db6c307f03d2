"""Every method at its default recipe: what it scores, weighs and costs beside a linear probe.

    python benchmarks/bench_methods.py [METHOD …] [--part 0/2]                                        the embedded backbones
    python benchmarks/bench_methods.py [METHOD …] --arch ARCH --weights FILE [--pixels 112] DATA …

500 training images, 8 epochs; on the embedded ViT (EfficientNet-Lite0 for methods that a ViT refuses) two embedded tasks
with three seeds, on another backbone the tasks given with one. Top-1 is on the test images. Each run is a process of its
own, forked before anything is computed: its peak memory is what it adds to the bare program's. Step time is the median of a
training step at batch 32 over that of the linear probe, taken in turns in one process. The fold error is the largest
difference of folded and attached logits over the largest logit, on test images in float32. A method that the backbone
refuses has no row. Precision is bf16 where the CPU
multiplies in it, and float32 elsewhere; each run's is kept with its machine.

A run that is in results/methods.json for the same code of the method is not repeated: stop it and start it again as you
like. `--part 0/2` and `--part 1/2` share the work of two processes; pin each to a core.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _probe import probed
from _results import FOLDER, machine
from filelock import FileLock

from vtzoo import data as D
from vtzoo import registry
from vtzoo.artifact import as_delta, fold_artifact, go_live, open_ref, plain_model, resolved_card
from vtzoo.backbone import build_card, sized
from vtzoo.errors import NotFoldable, VtzooError
from vtzoo.fit import Plan, stepper
from vtzoo.live import inject
from vtzoo.recipe import Recipe
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

VIT, CNN = "vit_embedded_64", "tf_efficientnet_lite0"
TASKS = ("vtzoo:fashion", "vtzoo:emoji")
IMAGES, EPOCHS, SEEDS, STEPS, BATCH = 500, 8, 3, 12, 32
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
KEPT = FOLDER / "methods.json"
SWEPT = "linear, swept"
WORDS = {"GROUP", "PAPER", "INTERMEDIATES"}
"""Constants of a method's file on which no result depends."""
HEAD = ("method", "backbone", "task", "top-1", "by seed", "over linear", "trained numbers", "file, kB", "precision", "step / linear's", "peak memory, MB", "fold error")  # fmt: skip


def cell(method: str, backbone: str, data: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    before = _resident()
    recipe = {"epochs": EPOCHS, "image_size": asked.pixels, "precision": asked.precision, "limit": IMAGES, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        if asked.weights:
            add_backbone(name=backbone, arch=asked.arch, weights=asked.weights, zoo=zoo)
        made = train(backbone=backbone, data=data, method=method, name="task/delta", zoo=zoo, recipe=recipe)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        found = {
            "test": made.metrics["test"]["top1"], "val": made.metrics["val"]["top1"], "seconds": made.metrics["seconds"],
            "lr": made.recipe["lr"], "params": made.params, "bytes": Path(made.path).stat().st_size, "peak_mb": peak,
            "fold_error": _fold_error(made.ref, data, zoo),
        }  # fmt: skip
        if not seed:
            found["step_ratio"], found["step_ms"] = _steps(method, backbone, zoo, asked, made.recipe["lr"])
    return found


@torch.inference_mode()
def _fold_error(ref: str, data: str, zoo: Zoo) -> float | None:
    """Folded against attached on one batch of test images; None where it does not fold."""
    artifact = open_ref(ref, zoo)
    delta, live = as_delta(artifact), go_live(artifact)
    images = D.open_data(data, split="test").limit(64, 0)
    x, _ = next(iter(D.loader(images, D.transforms(live.preprocess, train=False), batch_size=64)))
    try:
        plain = plain_model(delta, fold_artifact(delta, zoo, None), len(delta.tasks[0].classes))
    except NotFoldable:
        return None
    a, b = live.model(x), plain(x)
    return float((a - b).abs().max() / a.abs().max())


def _steps(method: str, backbone: str, zoo: Zoo, asked: argparse.Namespace, lr: float) -> tuple[float, float]:
    """The median training step over the probe's, and in milliseconds."""
    card, args = sized(resolved_card(backbone, zoo), asked.pixels)
    x, y = torch.randn(BATCH, *card.preprocess.input_size), torch.arange(BATCH) % 10
    recipe = Recipe(lr=lr, precision=asked.precision)
    todo: list[Callable[[tuple[torch.Tensor, ...]], torch.Tensor]] = []
    for spec in (method, "linear"):
        model = inject(build_card(card, zoo=zoo, num_classes=10, **args), spec, batches=[(x, y)])
        todo.append(stepper(Plan(model=model, loss=_loss, batches=lambda *_: [(x, y)], steps=STEPS, recipe=recipe)))
    taken: list[list[float]] = [[], []]
    for _ in range(STEPS):
        for step, times in zip(todo, taken, strict=True):
            start = time.perf_counter()
            step((x, y))
            times.append(time.perf_counter() - start)
    ours, probe = (statistics.median(times[2:]) for times in taken)
    return ours / probe, ours * 1000


def _loss(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def swept(backbone: str, data: str, asked: argparse.Namespace, seeds: int) -> list[dict[str, Any]]:
    """The probe with its rate chosen on validation images: harder to beat than `linear` at its default."""
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        if asked.weights:
            add_backbone(name=backbone, arch=asked.arch, weights=asked.weights, zoo=zoo)
        card, args = sized(resolved_card(backbone, zoo), asked.pixels)
        model = build_card(card, zoo=zoo, **args)
        heads = probed(
            model,
            card.preprocess,
            data,
            limit=IMAGES,
            seeds=seeds,
            lrs=LRS,
            epochs=EPOCHS,
            bf16=asked.precision == "bf16",
        )
    return [{"test": h.test, "val": h.val, "lr": h.lr, "params": h.params} for h in heads]


def forked(job: Callable[[], Any]) -> Any:
    """What a job gives in a process of its own, or {"failed": why}."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            answer = job()
        except VtzooError as error:
            answer = {"failed": str(error)}
        except BaseException:  # noqa: BLE001 - the parent says it
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"failed": "the process died"}


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies in bf16 itself; where it does not, float32 is faster."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public name for it


def _resident() -> float:
    """Of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@contextmanager
def kept() -> Iterator[dict[str, Any]]:
    """The results file, for one process at a time."""
    with FileLock(f"{KEPT}.lock"):
        known = json.loads(KEPT.read_text()) if KEPT.is_file() else {"runs": {}, "cells": {}}
        yield known
        KEPT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def source(method: str) -> str:
    """A digest of the code, not the words, of a method's file and of the helpers that it names: its results are stale when it changes."""
    path = Path(registry.card("methods", "linear" if method == SWEPT else method.partition("[")[0]).path)
    text, known = path.read_text(encoding="utf-8"), set[str]()
    while new := set(re.findall(r"vtzoo\.methods\.(_\w+)", text)) - known:
        known |= new
        text += "".join(path.with_name(f"{n}.py").read_text(encoding="utf-8") for n in sorted(new))
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):  # a refusal's words
            node.exc = node.cause = None
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [n for n in node.body if not _says(n)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def _says(node: ast.stmt) -> bool:
    """A docstring, or a constant of `WORDS`."""
    if isinstance(node, ast.Assign):
        return {ast.unparse(t) for t in node.targets} <= WORDS
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def cells(asked: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """Every run that is wanted: method, backbone, task, seed."""
    methods = asked.methods or registry.names("methods")
    if asked.arch:
        return [(m, asked.arch, data, 0) for m in ["linear", *methods] for data in asked.data]
    found = {m: forked(lambda m=m: _home(m)) for m in methods}
    where = {
        m: b if isinstance(b, str) else VIT for m, b in found.items()
    }  # what fails here fails in its cell, and says so
    todo = [(m, where[m], data, seed) for seed in range(SEEDS) for data in TASKS for m in methods]
    return [*((m, b, d, s) for s in range(SEEDS) for m in ("linear",) for b in (VIT, CNN) for d in TASKS), *todo]


def _home(method: str) -> str:
    """The embedded backbone that a method is measured on."""
    model = build_card(resolved_card(VIT, None), num_classes=2)
    size = model.pretrained_cfg["input_size"]
    try:
        inject(model, method, batches=[(torch.randn(4, *size), torch.tensor([0, 0, 1, 1]))])
    except VtzooError:
        return CNN
    return VIT


def run(asked: argparse.Namespace) -> None:
    """Do what is not done yet."""
    part, _, parts = asked.part.partition("/")
    todo = list(dict.fromkeys(cells(asked)))
    pairs = list(dict.fromkeys((b, d) for _, b, d, _ in todo))
    for i, (method, backbone, data, seed) in enumerate([*((SWEPT, b, d, -1) for b, d in pairs), *todo]):
        name = " | ".join((method, backbone, Path(data).name.removeprefix("vtzoo:"), str(seed), _how(asked)))
        with kept() as known:
            done = known["cells"].get(name, {}).get("source") == source(method)
        if done or i % int(parts) != int(part):
            continue
        job = (lambda b=backbone, d=data: {"heads": swept(b, d, asked, 1 if asked.arch else SEEDS)}) if method == SWEPT else (
            lambda m=method, b=backbone, d=data, s=seed: cell(m, b, d, s, asked)
        )  # fmt: skip
        where = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": f"{machine()}, {asked.precision}"}
        found = {"source": source(method), **where, **forked(job)}
        shown = found.get("failed") or found.get("test") or [h["test"] for h in found["heads"]]
        print(f"{name}: {shown} ({found.get('seconds', 0):.0f} s)", flush=True)
        with kept() as known:
            known["cells"][name] = found


def _how(asked: argparse.Namespace) -> str:
    return f"{asked.pixels} px"


def publish(asked: argparse.Namespace) -> None:
    """Make the tables of all runs from the cells."""
    with kept() as known:
        known["about"] = (__doc__ or "").splitlines()[0]
        groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
        for name, found in known["cells"].items():
            method, backbone, task, seed, how = name.split(" | ")
            groups.setdefault((how, method, backbone, task), {})[int(seed)] = found
        for how in {g[0] for g in groups}:
            rows = [row(groups, key) for key in sorted(groups) if key[0] == how]
            known["runs"][f"500 images, 8 epochs, {how}"] = {
                "command": " ".join(["python", "benchmarks/bench_methods.py", *_arguments()])
                if how == _how(asked)
                else known["runs"].get(f"500 images, 8 epochs, {how}", {}).get("command", ""),
                "date": max(c["date"] for n, c in known["cells"].items() if n.endswith(how)),
                "machine": "; ".join(sorted({c["machine"] for n, c in known["cells"].items() if n.endswith(how)})), "head": list(HEAD), "rows": [list(r) for r in rows if r],
            }  # fmt: skip


def _arguments() -> list[str]:
    skip = {i for i, a in enumerate(sys.argv) if a == "--part" or sys.argv[i - 1] == "--part"}
    return [a for i, a in enumerate(sys.argv) if i and i not in skip]


def row(groups: dict[tuple[str, ...], dict[int, dict[str, Any]]], key: tuple[str, ...]) -> tuple[str, ...]:
    """One line of the table: the mean of the seeds; the costs are the first seed's."""
    how, method, backbone, task = key
    runs = [groups[key][s] for s in sorted(groups[key])]
    if method == SWEPT:
        runs = runs[0].get("heads", runs)
    if failed := next((r["failed"] for r in runs if "failed" in r), None):
        if "Traceback" not in failed:  # the backbone has no place for it
            return ()
        return (method, backbone, task, "failed: " + failed.strip().splitlines()[-1], *[""] * 8)
    scores, first = [r["test"] for r in runs], runs[0]
    probe = [r["test"] for r in groups.get((how, "linear", backbone, task), {}).values() if "test" in r]
    over = f"{100 * (statistics.fmean(scores) - statistics.fmean(probe)):+.1f}" if probe else ""
    fold = first.get("fold_error")
    precision = " ".join(sorted({r["machine"].rpartition(", ")[2] for r in groups[key].values()}))
    return (
        method, backbone, task, f"{statistics.fmean(scores):.3f}", " ".join(f"{s:.3f}" for s in scores), over,
        f"{first['params']:,}", f"{first['bytes'] / 1000:.1f}" if "bytes" in first else "", precision,
        f"{first['step_ratio']:.2f}" if "step_ratio" in first else "",
        f"{first['peak_mb']:.0f}" if "peak_mb" in first else "", "" if fold is None else f"{fold:.0e}",
    )  # fmt: skip


def parsed() -> argparse.Namespace:
    """Read the command line; what names a folder or an embedded task is data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--precision", default="bf16" if bf16_is_fast() else "fp32")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("words", nargs="*", metavar="METHOD or DATA")
    asked = parser.parse_intermixed_args()
    asked.data = [w for w in asked.words if "/" in w or w.startswith("vtzoo:")]
    asked.methods = [w for w in asked.words if w not in asked.data]
    return asked


if __name__ == "__main__":
    wanted = parsed()
    run(wanted)
    publish(wanted)

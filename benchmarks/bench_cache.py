"""Training whose frozen layers run once for each view of an image, beside a plain loop that runs them in every step.

    python benchmarks/bench_cache.py --weights FILE [--arch vit_small_patch14_dinov2] [--pixels 56] [--limit 1000] [--method SPEC] DATA

The same images, views (plain and mirrored), order, first weights, memory format, optimiser and schedule on both sides; both validate after
each epoch, from the first step to the last validation, features included, which ours computes anew for each row. Beside that the
whole call, from the backbone's file to the stored delta, test images included, which the plain loop does not look at. The last
column is how far the trained numbers lie apart at most, and their largest. Adds its rows to results/cache.json.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _results import keep
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import vtzoo
from vtzoo import data as D
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_sized
from vtzoo.delta import Delta
from vtzoo.devices import channels_last
from vtzoo.live import trainable
from vtzoo.recipe import Recipe
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

HEAD = (
    "method",
    "epochs",
    "plain loop, s",
    "ours, s",
    "times faster",
    "whole call, s",
    "val top-1, plain and ours",
    "largest difference, largest number",
)
METHODS = (
    ("linear", 100),
    ("partial[blocks=2]", 10),
    ("lora[rank=8,targets=blocks.8.*|blocks.9.*|blocks.10.*|blocks.11.*]", 10),
    ("lst", 10),
)


def plain(zoo: Zoo, method: str, recipe: Recipe, data: str) -> tuple[float, float, dict[str, Tensor]]:
    """Train in a loop as one writes it with timm: seconds, validation top-1, the trained tensors."""
    images = D.open_data(data, split="train").limit(recipe.limit, recipe.seed)
    val = D.open_data(data, split="val").aligned(images.classes)
    torch.manual_seed(recipe.seed)
    card, model = build_sized(
        resolved_card("measured", zoo), recipe.image_size, zoo=zoo, num_classes=len(images.classes)
    )
    vtzoo.inject(channels_last(model), method, seed=recipe.seed)
    trained = trainable(model)
    shape, size, top1 = card.preprocess, recipe.batch_size, 0.0
    flipped, as_is = D.transforms(shape, train=True, augment="flip"), D.transforms(shape, train=False)
    start, steps = time.perf_counter(), -(-len(images) // size)
    weights = [p for p in trained.values() if p.ndim > 1], [p for p in trained.values() if p.ndim == 1]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(weights, (recipe.weight_decay or 0.0, 0.0), strict=True)]
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=recipe.lr)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps * recipe.epochs, lr_min=recipe.lr * recipe.min_lr_fraction, warmup_t=steps,
        warmup_lr_init=recipe.lr * 0.01, warmup_prefix=False, t_in_epochs=False,
    )  # fmt: skip
    step = 0
    for epoch in range(recipe.epochs):
        model.train()
        for x, y in D.loader(images, flipped, batch_size=size, seed=recipe.seed, epoch=epoch):
            schedule.step_update(step)
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(trained.values(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        model.eval()
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in D.loader(val, as_is, batch_size=size)]
        top1 = torch.cat(right).mean().item()
    return time.perf_counter() - start, top1, {n: p.detach() for n, p in trained.items()}


def ours(zoo: Zoo, method: str, recipe: Recipe, data: str) -> tuple[float, float, float, dict[str, Tensor]]:
    """The same by this package: seconds of the training and of the whole call, validation top-1, the trained tensors."""
    start = time.perf_counter()
    made = train(backbone="measured", data=data, method=method, name="task/run", zoo=zoo, recipe=asdict(recipe))
    whole = time.perf_counter() - start
    tensors = dict(Delta.open(made.path).tensors)
    zoo.remove(zoo.resolve("task/run"))
    for file in (zoo.root / ".vtzoo" / "features").iterdir():
        file.unlink()
    return (
        made.metrics["seconds"],
        whole,
        made.metrics["val"]["top1"],
        {n.removeprefix("@head/task/"): t for n, t in tensors.items()},
    )


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of what has the same name, a replacement tensor's as `x.full.weight` or `x.weight`."""
    named = {n.replace(".partial.", "."): t for n, t in b.items()}
    return max((t - named[n.replace(".partial.", ".")]).abs().max().item() for n, t in a.items())


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--arch", default="vit_small_patch14_dinov2")
    parser.add_argument("--pixels", type=int, default=56)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--method", choices=[m for m, _ in METHODS], help="this one alone")
    asked = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        add_backbone(name="measured", arch=asked.arch, weights=asked.weights, zoo=zoo)
        for method, epochs in [m for m in METHODS if asked.method in (None, m[0])]:
            rate = 1e-2 if method == "linear" else 1e-3
            recipe = Recipe(
                epochs=epochs, lr=rate, head_lr=rate, weight_decay=1e-4, limit=asked.limit,
                image_size=asked.pixels,
            )  # fmt: skip
            slow, before, a = plain(zoo, method, recipe, asked.data)
            fast, whole, after, b = ours(zoo, method, recipe, asked.data)
            largest = max(t.abs().max().item() for t in a.values())
            raw[method] = {"plain": slow, "ours": fast, "whole": whole, "top1": [before, after], "apart": apart(a, b)}
            times = f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.1f}", f"{whole:.1f}"
            rows.append(
                (
                    method,
                    str(recipe.epochs),
                    *times,
                    f"{before:.3f} and {after:.3f}",
                    f"{apart(a, b):.1e}, {largest:.2f}",
                )
            )
            print(" | ".join(rows[-1]), flush=True)
            title = f"{asked.arch}, {asked.pixels} px, {asked.limit} images of {Path(asked.data).name}"
            title += f", {asked.method}" if asked.method else ""
            keep(__doc__ or "", title, HEAD, rows, raw)


if __name__ == "__main__":
    main()

"""The whole main job once, on what the package carries: train, evaluate, merge, fold, distil, export."""

import time
from pathlib import Path
from typing import Any

from vtzoo import talk
from vtzoo.results import Demo
from vtzoo.verbs.distill import distill
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

CNN, VIT = "tf_efficientnet_lite0", "vit_embedded_64"
RECIPE: dict[str, Any] = {"image_size": 64, "epochs": 4, "batch_size": 32, "augment": "flip"}
SMALL: dict[str, Any] = {"lr": 3e-4, "head_lr": 1e-2}
"""A small rate for deltas and a large one for heads: deltas that stay near the backbone lose little when merged."""
DELTAS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("fashion/lora", CNN, "lora[rank=8]", SMALL),
    ("emoji/ssf", CNN, "ssf", SMALL),
    ("clipart/bitfit", CNN, "bitfit", SMALL),
    ("fashion/prompts", VIT, "vpt-deep", {}),
)
MERGED = ("fashion/lora", "emoji/ssf", "clipart/bitfit")
STUDENT = "test_efficientnet"


def demo(*, out: Path) -> Demo:
    """Run the main job in a fresh zoo; nothing is downloaded.

    Args:
        out: a folder that becomes the zoo; it also gets the folded model and the ONNX file.

    Returns:
        `report`: one row per artifact with its size in bytes, top-1 on the test split, and the largest relative numeric
        difference where something was verified.

    Raises:
        Conflict: `out` is a zoo already.
    """
    zoo = Zoo.init(out)
    zoo.command = "vtzoo demo"
    started = time.monotonic()
    rows = [_trained(zoo, *delta) for delta in DELTAS]
    merge_refs(refs=list(MERGED), method="ties[density=0.2,scale=0.5]", name="all-in-one", zoo=zoo)
    rows += [_merged(zoo, parent) for parent in MERGED]
    folded = fold_ref(ref="fashion/lora", out=zoo.root / "fashion-folded", zoo=zoo, name="fashion/folded")
    rows.append(
        _row(
            zoo,
            "fashion/folded",
            "fold of fashion/lora",
            _top1(zoo, "fashion/folded", "fashion"),
            folded.report["max_rel"],
        )
    )
    recipe = {"image_size": 64, "epochs": 16, "batch_size": 32, "lr": 3e-3}
    distill(
        teachers=["fashion/lora"],
        student=STUDENT,
        data="vtzoo:fashion",
        loss="kd",
        name="fashion/student",
        zoo=zoo,
        recipe=recipe,
    )
    rows.append(
        _row(zoo, "fashion/student", f"kd from fashion/lora into {STUDENT}", _top1(zoo, "fashion/student", "fashion"))
    )
    shipped = export_onnx(ref="all-in-one", task="fashion", out=zoo.root / "fashion.onnx", zoo=zoo, name="fashion/onnx")
    worst = max(b["max_rel"] for b in shipped.report["batches"])
    rows.append(_row(zoo, "fashion/onnx", "export of all-in-one, run by onnxruntime", None, worst))
    seconds = round(time.monotonic() - started, 1)
    talk.say(f"done in {seconds} s")
    return Demo(ref="", path=str(zoo.root), report={"backbones": [CNN, VIT], "seconds": seconds, "artifacts": rows})


def _trained(zoo: Zoo, name: str, backbone: str, method: str, rates: dict[str, Any]) -> dict[str, Any]:
    data = f"vtzoo:{name.partition('/')[0]}"
    made = train(backbone=backbone, data=data, method=method, name=name, zoo=zoo, recipe={**RECIPE, **rates})
    return _row(zoo, name, f"{method} on {backbone}", made.metrics["test"]["top1"])


def _merged(zoo: Zoo, parent: str) -> dict[str, Any]:
    task = parent.partition("/")[0]
    return _row(zoo, "all-in-one", f"merge of three, task {task}", _top1(zoo, "all-in-one", task))


def _top1(zoo: Zoo, ref: str, task: str) -> float:
    return evaluate(ref=ref, data=f"vtzoo:{task}", task=task, zoo=zoo).metrics[task]["top1"]


def _row(zoo: Zoo, name: str, how: str, top1: float | None, difference: float | None = None) -> dict[str, Any]:
    size = zoo.resolve(name).facts["size_bytes"]
    return {"name": name, "how": how, "size_bytes": size, "top1": top1, "max_difference": difference}

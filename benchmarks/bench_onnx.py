"""What an ONNX file is worth: backbone x method x precision, its difference from torch, size and speed.

    python benchmarks/bench_onnx.py [--quick] [--weights DIR] [--images DIR] [--only NAME ...]

A delta is trained for a moment on real images, exported in float32, float16, int8 dynamic and int8 static, and each file is run on
300 test images beside the network in torch: largest difference relative to the largest logit, mean cosine, how often both name the
same class; and its size and its time for one image, beside torch's on as many threads (all others at rest: run it alone).

Without options these are the embedded backbones on an embedded task, and other architectures with random weights, of which 50 of the
images tell the difference and speed, but no class worth naming. `--weights` has further weights, ARCH.safetensors, each with
its real task from `--images`. `--only` picks some by name, as a run of their own. What is refused stands with its reason.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from _results import keep
from safetensors.torch import save_file

from vtzoo import data as D
from vtzoo.artifact import go_live, open_ref
from vtzoo.errors import VtzooError
from vtzoo.onnx import verify
from vtzoo.onnx.looks import Look
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"half": True},
    "int8 dynamic": {"int8": "dynamic"},
    "int8 static": {"int8": "static"},
}
METHODS = ("linear", "lora", "ssf", "bitfit", "vpt-deep", "adapter", "lst", "conv-adapter")
SOME, FEW = ("lora", "ssf", "vpt-deep", "adapter"), ("lora", "adapter")
EMBEDDED = ("vit_embedded_64", "tf_efficientnet_lite0")
RANDOM = (
    "swinv2_tiny_window8_256",
    "beit_base_patch16_224",
    "convnext_atto",
    "resnet18",
    "mobilenetv3_small_050",
    "hiera_tiny_224",
)
PIXELS = {"vit_small_patch14_dinov2": 112, "tf_efficientnet_lite0": 128, "tf_efficientnet_lite2": 128}
IMAGES, FEWER = 300, 50
"""Of networks with weights that know something, and of random ones."""
RECIPE = {"epochs": 2, "limit": 200, "eval_limit": 20, "batch_size": 20}
ONCE = {"epochs": 1, "limit": 20, "eval_limit": 20, "batch_size": 10}
HEAD = ("backbone", "method", "precision", "how", "max difference", "cosine", "same top-1", "MB", "onnxruntime, ms", "torch, ms")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A backbone and the images that it is tried on."""

    name: str
    data: str
    methods: tuple[str, ...]
    weights: Path | None = None
    random: bool = False


def networks(asked: argparse.Namespace) -> Iterator[Network]:
    """What is measured."""
    methods = METHODS if not asked.quick else FEW
    for name in EMBEDDED:
        yield Network(name, "vtzoo:fashion", methods)
    if asked.quick:
        return
    for path in sorted(asked.weights.glob("*.safetensors")) if asked.weights else ():
        yield Network(path.stem, str(asked.images / "clothing"), SOME, path)
    for name in RANDOM:
        yield Network(name, "vtzoo:fashion", FEW, random=True)


def rows(network: Network, folder: Path) -> Iterator[dict[str, Any]]:
    """One row a method and precision."""
    zoo = Zoo.init(folder / "zoo")
    backbone = _backbone(network, zoo)
    for method in network.methods:
        size = {"image_size": PIXELS[network.name]} if network.name in PIXELS else {}
        try:
            recipe = (ONCE if network.random else RECIPE) | size
            train(backbone=backbone, data=network.data, method=method, name=f"task/{method}", zoo=zoo, recipe=recipe)
        except VtzooError as error:
            yield {"backbone": network.name, "method": method, "precision": "", "refused": error.message}
            continue
        for precision in PRECISIONS:
            yield {
                "backbone": network.name,
                "method": method,
                "precision": precision,
                **_cell(network, method, precision, zoo),
            }


def _backbone(network: Network, zoo: Zoo) -> str:
    """The package's own, given weights, or random ones."""
    if network.name in EMBEDDED and network.weights is None:
        return network.name
    path = network.weights
    if path is None:
        torch.manual_seed(0)
        path = zoo.root / "weights.safetensors"
        save_file(timm.create_model(network.name, num_classes=0).state_dict(), path)
    add_backbone(name="net", arch=network.name, weights=path, zoo=zoo)
    return "net"


def _cell(network: Network, method: str, precision: str, zoo: Zoo) -> dict[str, Any]:
    """Export, and run both on the images."""
    out = zoo.root / f"{method}-{precision.replace(' ', '-')}.onnx"
    try:
        report = export_onnx(ref=f"task/{method}", out=out, data=network.data, zoo=zoo, **PRECISIONS[precision]).report
    except VtzooError as error:
        return {"refused": error.message}
    live, shipped = (go_live(open_ref(r, zoo, exports=True)) for r in (f"task/{method}", str(out)))
    images = D.open_data(network.data, split="test").limit(FEWER if network.random else IMAGES)
    found = verify.differences(live.model, shipped.model, Look(images, D.transforms(live.preprocess, train=False)))
    said = verify.summary(found, classes=not network.random)
    kept = (
        "folded",
        "attached_because",
        "quantised",
        "in_float",
        "size_bytes",
        "onnxruntime_ms",
        "torch_ms",
        "threads",
    )
    out.unlink()
    return {**said, **{k: report[k] for k in kept if k in report}, "images": len(images)}


def shown(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    names = [row["backbone"], row["method"], row["precision"]]
    if why := row.get("refused"):
        return [*names, f"refused: {why}", *[""] * 6]
    how = ", ".join(p for p in ("folded" if row["folded"] else "attached", row.get("quantised", "")) if p)
    same = f"{row['top1_agreement']:.3f}" if "top1_agreement" in row else ""
    return [
        *names, how, f"{row['max_rel']:.1e}", f"{row['cosine']:.5f}", same, f"{row['size_bytes'] / 1e6:.1f}",
        f"{row['onnxruntime_ms']:.1f}", f"{row['torch_ms']:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Print rows as they come and keep them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the embedded backbones and two methods")
    parser.add_argument("--weights", type=Path, help="a folder of ARCH.safetensors")
    parser.add_argument("--images", type=Path, help="the folder of the task clothing")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these backbones")
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    run = f"{'quick, ' if asked.quick else ''}{IMAGES} images, {threads} thread{'s' * (threads > 1)}"
    run += f": {', '.join(asked.only)}" if asked.only else ""
    print(" | ".join(HEAD))
    for network in (n for n in networks(asked) if not asked.only or n.name in asked.only):
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(network, Path(folder)):
                found.append(row)
                print(" | ".join(shown(row)), flush=True)
        keep(__doc__ or "", run, HEAD, [shown(row) for row in found], found)


if __name__ == "__main__":
    main()

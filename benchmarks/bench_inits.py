"""First weights from another network: how far Net2Net changes the function, and what weight selection is worth.

    python benchmarks/bench_inits.py                                                    Net2Net: the largest change of outputs
    python benchmarks/bench_inits.py --weights FILE [--arch vit_small_patch14_dinov2] [--pixels 56] [--epochs 10] [--limit 500] DATA …
    python benchmarks/bench_inits.py --backbone vit_embedded_64 [--epochs 20] DATA …

Net2Net: networks of timm's sizes, every parameter moved, in float64 and float32; the largest difference of outputs on four random images over
the largest output. Training: a student of half the source's width, a quarter of its size, all of it trained with one recipe
from random weights and from selected ones; top-1 on the test images of each DATA (train|val|test/CLASS/*). Adds its rows to results/inits.json.
"""

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from _results import keep
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import data as D
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card, sized
from vtzoo.feed import of_images
from vtzoo.fit import Plan, fit
from vtzoo.initial import started
from vtzoo.recipe import Recipe
from vtzoo.score import logits_of, measure
from vtzoo.verbs.add import add_backbone
from vtzoo.zoo import Zoo

SEEDS = 3
WAYS = ("", "weight-selection")
GROWN: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "ViT, 12 to 14 blocks": ("vit_tiny_patch16_224", {}, {"depth": 14}),
    "ViT, hidden width 768 to 1152": ("vit_tiny_patch16_224", {}, {"mlp_ratio": 6.0}),
    "ViT, width 192 to 384": ("vit_tiny_patch16_224", {}, {"embed_dim": 384, "num_heads": 6}),
    "ViT, width, hidden width and blocks": ("vit_tiny_patch16_224", {}, {"embed_dim": 384, "num_heads": 6, "mlp_ratio": 5.0, "depth": 14}),
    "DINOv2 with registers, 12 to 14 blocks": ("vit_small_patch14_reg4_dinov2", {"img_size": 112}, {"depth": 14}),
    "DeiT-3, width 384 to 768": ("deit3_small_patch16_224", {}, {"embed_dim": 768, "num_heads": 12}),
    "BEiT, 12 to 14 blocks": ("beit_base_patch16_224", {}, {"depth": 14}),
    "Swin, width 96 to 192, 6 to 8 blocks": ("swin_tiny_patch4_window7_224", {}, {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "depths": (2, 2, 8, 2)}),
    "ConvNeXt, widths twice": ("convnext_atto", {}, {"dims": (80, 160, 320, 640)}),
    "ConvNeXt, 12 to 14 blocks": ("convnext_atto", {}, {"depths": (2, 2, 8, 2)}),
    "ResNet-50, inner widths twice": ("resnet50", {}, {"base_width": 128}),
    "ResNet-50, 16 to 18 blocks": ("resnet50", {}, {"layers": (3, 5, 6, 4)}),
    "MobileNetV4-Small, half width to full": ("mobilenetv4_conv_small_050", {}, {"model_name": "mobilenetv4_conv_small"}),
    "EfficientNet-Lite0 to Lite2": ("tf_efficientnet_lite0", {}, {"model_name": "tf_efficientnet_lite2"}),
}  # fmt: skip


@torch.no_grad()
def moved(arch: str, args: Mapping[str, Any]) -> nn.Module:
    """A network with every parameter away from its start, and statistics that a batch had."""
    torch.manual_seed(0)
    model = timm.create_model(arch, **{"num_classes": 10, **args}).double()
    for value in model.parameters():
        noise = torch.randn_like(value)
        value.copy_(noise * (1.5 * len(value) / value.numel()) ** 0.5 if value.ndim > 1 else value.clamp(0.5, 1.5) + 0.2 * noise)  # fmt: skip
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.momentum = 1.0
    side = int(args.get("img_size", 224))
    model.train()(torch.randn(4, 3, side, side, dtype=torch.float64))
    return model.eval()


@torch.no_grad()
def changed(small: nn.Module, large: nn.Module, side: int) -> float:
    """The largest difference of outputs over the largest output."""
    like = next(small.parameters())
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1)).to(like)
    started(large, small, "net2net")
    wanted = small(x)
    return ((large(x) - wanted).abs().max() / wanted.abs().max()).item()


def grow() -> None:
    """Net2Net's part."""
    rows: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    for name, (arch, args, more) in GROWN.items():
        small = moved(arch, args)
        large = timm.create_model(**{"model_name": arch, "num_classes": 10, **args, **more}).eval()
        side = int(args.get("img_size", 224))
        raw[name] = {
            str(kind).removeprefix("torch."): changed(
                copy.deepcopy(small).to(kind), copy.deepcopy(large).to(kind), side
            )
            for kind in (torch.float64, torch.float32)
        }
        rows.append((name, *(f"{v:.1e}" if v else "0" for v in raw[name].values())))
        print(" | ".join(rows[-1]), flush=True)
    keep(__doc__ or "", "Net2Net", ("what grows", "float64", "float32"), rows, raw)


def student(
    arch: str, args: Mapping[str, Any], source: nn.Module, way: str, seed: int, labels: tuple[str, ...]
) -> nn.Module:
    """A network of half the source's width, from random weights or from the source's."""
    torch.manual_seed(seed)
    width, heads = source.embed_dim // 2, source.blocks[0].attn.num_heads  # type: ignore[union-attr,index]
    heads = heads // 2 if heads % 2 == 0 else heads  # an odd number stays, each half as wide
    model = timm.create_model(arch, num_classes=len(labels), **args, embed_dim=width, num_heads=heads)
    return started(model, source, way, labels=labels) if way else model


def trained(make: Callable[..., nn.Module], preprocess: Any, data: str, way: str, recipe: Recipe) -> float:
    """Train all of a student; top-1 on test images."""
    train = D.open_data(data, split="train").limit(recipe.limit, recipe.seed)
    val, test = (D.open_data(data, split=s).aligned(train.classes) for s in ("val", "test"))
    model = make(way, recipe.seed, tuple(train.classes)).requires_grad_()
    feed = of_images(train, val, preprocess, recipe)
    steps = math.ceil(len(train) / recipe.batch_size)
    fit(Plan(model=model, loss=loss, batches=feed.batches, steps=steps, recipe=recipe))
    look = D.transforms(preprocess, train=False)
    return measure(*logits_of(model, D.loader(test, look, batch_size=64)))["top1"]


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train(asked: argparse.Namespace) -> None:
    """The students' part."""
    rows: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.init(Path(folder) / "zoo")
        if asked.weights:
            add_backbone(name="measured", arch=asked.arch, weights=asked.weights, zoo=zoo)
        card, args = sized(resolved_card("measured" if asked.weights else asked.backbone, zoo), asked.pixels)
        source, args = build_card(card, zoo=zoo, **args), {**card.model_args, **args}
        make = partial(student, card.arch, args, source)
        for data in asked.data:
            for way in WAYS:
                start, found = time.perf_counter(), list[float]()
                for seed in range(SEEDS):
                    recipe = Recipe(epochs=asked.epochs, lr=asked.lr, weight_decay=0.05, limit=asked.limit, batch_size=32, seed=seed, image_size=asked.pixels)  # fmt: skip
                    found.append(trained(make, card.preprocess, data, way, recipe))
                task, seconds = Path(data).name, (time.perf_counter() - start) / SEEDS
                raw[f"{task} {way}"] = {"top1": found, "seconds": seconds}
                shown = " ".join(f"{v:.3f}" for v in found)
                rows.append((task, way or "random", f"{statistics.fmean(found):.3f}", shown))
                print(" | ".join(rows[-1]), f"({seconds:.0f} s each)", flush=True)
                title = f"a student of half the width of {asked.arch if asked.weights else asked.backbone}, {card.preprocess.input_size[1]} px, {asked.limit} images, {asked.epochs} epochs"
                keep(__doc__ or "", title, ("task", "first weights", "test top-1, mean", "by seed"), rows, raw)


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--arch", default="vit_small_patch14_dinov2")
    parser.add_argument("--backbone", default="vit_embedded_64", help="where no weights are given")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    asked = parser.parse_args()
    asked.pixels = asked.pixels or (56 if asked.weights else None)
    train(asked) if asked.data else grow()


if __name__ == "__main__":
    main()

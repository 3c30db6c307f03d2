"""One of each, made from one another by the command line: deltas, a merge, a fold, a student and an export, on noise."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from tests.e2e.students import CARS, PETS, images_of
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

SMALL = ("--epochs", "1", "--batch-size", "8", "--image-size", "32", "--lr", "1e-3")


def ran(*words: str | Path) -> int:
    """The exit code of one command line."""
    return main(["--quiet", *map(str, words)])


def chain(root: Path) -> Zoo:
    """A zoo below `root`, the images in `pets` and `cars`."""
    zoo = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "vit.safetensors")
    for seed, (name, classes) in enumerate({"pets": PETS, "cars": CARS}.items()):
        images_of(root / name, classes, seed)
    at = ("--zoo", zoo.root)
    steps: list[tuple[str | Path, ...]] = [
        ("add", "backbone", "tiny", "--arch", "test_vit", "--weights", root / "vit.safetensors", "--license", "mit"),
        ("train", "--backbone", "tiny", "--data", root / "pets", "--method", "lora[rank=2]", "--name", "pets/lora", *SMALL),
        ("train", "--backbone", "tiny", "--data", root / "cars", "--method", "ssf", "--name", "cars/ssf", *SMALL),
        ("merge", "pets/lora", "cars/ssf", "--method", "linear", "--name", "both"),
        ("fold", "both", "--task", "pets", "--out", root / "folded", "--name", "pets/folded"),
        ("distill", "--teacher", "pets/folded", "--student", "test_efficientnet", "--data", root / "pets", "--name", "pets/small", "--views", "1", *SMALL),
        ("export", "onnx", "pets/small", root / "small.onnx", "--embed-preprocess", "--name", "pets/onnx"),
    ]  # fmt: skip
    for step in steps:
        assert ran(*at, *step) == 0, step
    return zoo

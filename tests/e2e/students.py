"""A small world to distil in: noise of 32 pixels, a tiny ConvNet and ViT, deltas for two kinds of images, and merges of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vtzoo.files import header
from vtzoo.results import Distilled
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.distill import distill
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

PETS, CARS = ("cat", "dog"), ("bus", "van")
RECIPE = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "image_size": 32}


def images_of(root: Path, classes: Sequence[str], seed: int) -> Path:
    """Noise: the names and sizes of the files are the same for every seed."""
    draw = np.random.default_rng(seed)
    for split, count in (("train", 8), ("val", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.bmp")
    return root


def world(root: Path) -> Path:
    """Two folders of images; deltas a, b (pets) and c (cars) with merges of them, as entries and as files."""
    zoo = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), root / "conv.safetensors")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "vit.safetensors")
    add_backbone(name="conv", arch="test_efficientnet", weights=root / "conv.safetensors", zoo=zoo)
    add_backbone(name="vit", arch="test_vit", weights=root / "vit.safetensors", zoo=zoo)
    for seed, (name, classes) in enumerate({"pets/a": PETS, "pets2/b": PETS, "cars/c": CARS}.items()):
        images = images_of(root / name.partition("/")[0], classes, seed)
        made = train(backbone="conv", data=str(images), method="lora[rank=2]", name=name, zoo=zoo, recipe={**RECIPE, "seed": seed})  # fmt: skip
        (root / f"{name[-1]}.safetensors").write_bytes(Path(made.path).read_bytes())
    merge_refs(refs=["pets/a", "cars/c"], method="linear", name="both", zoo=zoo)
    merge_refs(refs=["pets/a", "pets2/b"], method="linear", name="twice", zoo=zoo)
    fold_ref(ref="pets/a", out=root / "folded", zoo=zoo, name="pets/folded")
    return root


def distilled(place: Path, name: str, teachers: Sequence[str], **changes: Any) -> tuple[Distilled, dict[str, Any]]:
    """A student and what the zoo knows of how it was made."""
    zoo = Zoo(place / "zoo")
    given: dict[str, Any] = {"student": "test_efficientnet", "data": str(place / "pets"), "views": 1, **changes}
    given["recipe"] = {**RECIPE, "epochs": 0, **changes.get("recipe", {})}
    made = distill(teachers=teachers, name=name, zoo=zoo, **given)
    return made, zoo.resolve(name).facts["lineage"]


def kept(place: Path, kind: str = "answers") -> set[Path]:
    """Files of teachers' answers, or of students' pixels."""
    files = (place / "zoo" / ".vtzoo" / "cache" / "targets").glob("*.safetensors")
    return {f for f in files if json.loads(header(f).metadata["vtzoo"])["kind"] == kind}

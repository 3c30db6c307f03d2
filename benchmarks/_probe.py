"""The linear probe that deltas are measured against: frozen features once per image and view, then heads for next to nothing.

It is `vtzoo train --method linear` with the backbone taken out of the loop: the same loop (`vtzoo.fit`), the same start of
the head, the same pictures and flips as augment="flip" gives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import data as D
from vtzoo.fit import Plan, fit
from vtzoo.recipe import Recipe
from vtzoo.score import measure
from vtzoo.spec import Preprocess

BATCH = 64


@dataclass(frozen=True)
class Features:
    """What a frozen network makes of labelled images: `views` [views, n, width] and `labels` [n]; view 1 is mirrored."""

    views: Tensor
    labels: Tensor

    def at(self, places: Sequence[int]) -> "Features":
        """Some of the images."""
        return Features(self.views[:, places], self.labels[list(places)])


@dataclass(frozen=True)
class Probed:
    """One head: its seed, learning rate, top-1 on validation and test images, and how many numbers it has."""

    seed: int
    lr: float
    val: float
    test: float
    params: int


@torch.inference_mode()
def features(
    model: nn.Module, images: D.Images, shape: Preprocess, *, mirrored: bool = False, bf16: bool = False
) -> Features:
    """Run a headless model over images, upright and mirrored."""
    plain = D.transforms(shape, train=False)
    views = [plain, lambda image: plain(ImageOps.mirror(image))] if mirrored else [plain]
    found: list[Tensor] = []
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch takes it
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for view in views:
            found.append(torch.cat([model(x).float() for x, _ in D.loader(images, view, batch_size=BATCH)]))
    return Features(torch.stack(found).clone(), torch.tensor(images.labels))


def probe(train: Features, val: Features, test: Features, *, seed: int, lr: float, classes: int, epochs: int) -> Probed:
    """Train one head."""
    recipe = Recipe(epochs=epochs, lr=lr, weight_decay=0.0, seed=seed)
    torch.manual_seed(seed)
    head = nn.Linear(train.views.shape[2], classes)
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    count, size = len(train.labels), recipe.batch_size

    def batches(epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.tensor(D.order(count, seed, epoch))
        draw = torch.Generator().manual_seed(D.mixed(seed, epoch))
        view = torch.randint(len(train.views), (count,), generator=draw)
        for i in range(start * size, count, size):
            at = places[i : i + size]
            yield train.views[view[at], at], train.labels[at]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    fit(Plan(model=head, loss=loss, batches=batches, steps=-(-count // size), recipe=recipe))
    with torch.inference_mode():
        on_val, on_test = (measure(head(part.views[0]), part.labels)["top1"] for part in (val, test))
    return Probed(seed, lr, on_val, on_test, sum(p.numel() for p in head.parameters()))


def probed(
    model: nn.Module, shape: Preprocess, data: str, *, limit: int, seeds: int, lrs: Sequence[float], epochs: int,
    bf16: bool = False,
) -> list[Probed]:  # fmt: skip
    """One head per seed, each on `limit` training images of its own (0: all), its rate chosen by validation."""
    parts = {split: D.open_data(data, split=split) for split in ("train", "val", "test")}
    place = {path: i for i, path in enumerate(parts["train"].paths)}
    chosen = [[place[path] for path in parts["train"].limit(limit, seed).paths] for seed in range(seeds)]
    union = sorted({i for places in chosen for i in places})
    row = {p: i for i, p in enumerate(union)}
    known = features(model, parts["train"].take(union), shape, mirrored=True, bf16=bf16)
    val, test = (features(model, parts[s], shape, bf16=bf16) for s in ("val", "test"))
    classes, heads = len(parts["train"].classes), list[Probed]()
    for seed, places in enumerate(chosen):
        own = known.at([row[p] for p in places])
        tried = [probe(own, val, test, seed=seed, lr=lr, classes=classes, epochs=epochs) for lr in lrs]
        heads.append(max(tried, key=lambda p: p.val))
    return heads

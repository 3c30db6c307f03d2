"""What training is fed with: images, or what the frozen prefix makes of them, computed once for each view and kept on disk.

Kept where it pays: a tenth of the passes through the network's numbers go away, and the disk has room. A file of features is named by all
that they depend on: the backbone's architecture and fingerprint, the cut, the images' pixels and order, the preprocessing, the
view, precision and device, the packages' versions. So runs share it. A damaged file is seen when it is opened, and made again.
"""

import json
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vtzoo import data as D
from vtzoo import files, kept, machine, parallel, talk
from vtzoo.prefix import Prefix, share
from vtzoo.recipe import Recipe
from vtzoo.sampling import places
from vtzoo.spec import Preprocess
from vtzoo.tensors import CODES, TensorFile

BATCH = 64
"""Images that go through the prefix at once."""
TOOK = "seconds"
LEAST = 0.1
"""Which part of the passes through the network's numbers the features must save."""
Batch = tuple[Tensor, Tensor]
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Feed:
    """Batches, and how a network takes them.

    Attributes:
        batches: (epoch, first step) -> batches of training, of each this process's part.
        held_out: batches of the validation images, of those this process's (see `mine`).
        held: how many these are for all processes.
        run: (model, inputs) -> logits.
        steps: of an epoch.
        spared: seconds that features took whoever computed them in an earlier run.
    """

    batches: Callable[[int, int], Iterable[Batch]]
    held_out: Callable[[], Iterable[Batch]]
    held: int
    run: Forward
    steps: int
    spared: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where features are kept, and how they are computed.

    Attributes:
        folder: of their files.
        facts: what they depend on beside images and cut: the backbone, the precision, versions.
        precision: in which the network runs, a context.
        workers: processes that read images.
    """

    folder: Path
    facts: Mapping[str, Any]
    precision: Callable[[], AbstractContextManager[Any]]
    workers: int = 0


def of_images(train: D.Images, val: D.Images, preprocess: Preprocess, recipe: Recipe, *, whole: bool = False) -> Feed:
    """Images as they are; `whole` leaves out a last batch that isn't full."""
    size, workers = recipe.batch_size, recipe.workers
    drawn = D.transforms(preprocess, train=True, augment=recipe.augment, crop_area=recipe.crop_area)
    plain = D.transforms(preprocess, train=False)
    own = mine(val)

    def batches(epoch: int, start: int) -> D.Batches:
        return D.loader(
            train, drawn, batch_size=size, seed=recipe.seed, epoch=epoch, start=start, workers=workers, drop_last=whole,
            views=recipe.views, places=places(train.labels, recipe, epoch), part=partial(parallel.own, paired=whole),
        )  # fmt: skip

    return Feed(
        batches,
        lambda: D.loader(own, plain, batch_size=size, workers=workers),
        len(val),
        nn.Module.__call__,
        len(batches(0, 0)),
    )


def of_features(
    prefix: Prefix,
    model: nn.Module,
    train: D.Images,
    val: D.Images,
    preprocess: Preprocess,
    recipe: Recipe,
    place: Place,
) -> Feed:
    """What the prefix makes of images; computed here where it isn't kept already. Without validation there is nothing to hold out."""
    views, size = views_of(recipe), recipe.batch_size
    kept = [_features(place, prefix, model, train, preprocess, views, v) for v in range(views.count)]
    own, labels, held_labels = [features for features, _ in kept], train.targets, val.targets[:0]
    held = own[0][:0]
    if recipe.validates:
        kept.append(_features(place, prefix, model, val, preprocess, D.Views("none", 0), 0))
        held, held_labels = kept[-1][0], val.targets

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        order = places(train.labels, recipe, epoch)
        return _batches(order[start * size :], size, lambda i: own[views(epoch, i)][i], labels, parallel.own)

    return Feed(
        batches,
        lambda: _batches(parallel.turns(len(held_labels)), size, held.__getitem__, held_labels),
        len(held_labels),
        prefix.rest,
        -(-len(labels) // size),
        sum(seconds for _, seconds in kept),
    )


def mine(images: D.Images) -> D.Images:
    """The images that this process looks at, where all processes together measure."""
    return images if parallel.count() == 1 else images.take(parallel.turns(len(images)))


def views_of(recipe: Recipe) -> D.Views:
    """Which views of the images a recipe shows."""
    return D.Views(recipe.augment, recipe.seed, recipe.views, recipe.crop_area)


def pays(model: nn.Module, prefix: Prefix, views: D.Views, epochs: int, images: Sequence[int], folder: Path) -> bool:
    """Whether features are worth their place.

    Args:
        model: that is cut.
        prefix: where.
        views: of the training.
        epochs: of the training.
        images: how many there are for training, and for validation.
        folder: where they would be kept.
    """
    saved = share(model, prefix) * (1 - views.count / max(epochs, 1)) if views.count else 0.0
    return saved >= LEAST and fits(prefix, views, images, folder)


def fits(prefix: Prefix, views: D.Views, images: Sequence[int], folder: Path) -> bool:
    """Whether the disk has twice the room that features take."""
    return 2 * size_bytes(prefix, views, images) <= machine.free_bytes(folder)


def size_bytes(prefix: Prefix, views: D.Views, images: Sequence[int]) -> int:
    """What the features take in float32, for so many images of training and validation."""
    train, val = images
    return 4 * math.prod(prefix.shape) * (views.count * train + val)


def _batches(
    places: Sequence[int], size: int, row: Callable[[int], Tensor], labels: Tensor,
    part: Callable[[Sequence[int]], list[int]] = list,
) -> Iterator[Batch]:  # fmt: skip
    for at in range(0, len(places), size):
        own = part(places[at : at + size])
        yield torch.stack([row(i) for i in own]), labels[own]


def _features(
    place: Place, prefix: Prefix, model: nn.Module, images: D.Images, preprocess: Preprocess, views: D.Views, view: int
) -> tuple[Tensor, float]:
    """Features of every image in one view, [images, …], mapped from their file; and the seconds that they took an earlier run, if any."""
    known = {
        **prefix.facts, "images": images.ordered, "preprocess": asdict(preprocess), "view": views.facts(view), **place.facts,
    }  # fmt: skip
    path = kept.place(place.folder, known)

    def took() -> float:
        if kept.sound(path):
            return float(TensorFile(path)[TOOK])
        with kept.alone(path):
            if not kept.sound(path):  # nobody has computed it meanwhile
                if path.exists():
                    talk.say(f"{path} is damaged: it is computed again")
                rows = _computed(place, prefix, model, D.Seeded(images, *views.transform(preprocess, view)))
                _write(path, rows, len(images), {"vtzoo": json.dumps(known, sort_keys=True)})
        return 0.0

    spared = parallel.by_first(took)
    return kept.mapped(path)["features"], spared


def _computed(place: Place, prefix: Prefix, model: nn.Module, images: D.Seeded) -> Iterator[Tensor]:
    """Features of image after image, in batches."""
    device = next(model.parameters()).device
    ready = DataLoader(images, BATCH, num_workers=place.workers)
    with place.precision():
        for x, _ in talk.track(ready, "features", len(ready)):
            yield prefix.features(model, x.to(device)).cpu()


def _write(path: Path, rows: Iterable[Tensor], count: int, metadata: Mapping[str, str]) -> None:
    """One tensor, batch by batch, its CRC-32, and the seconds that it took."""
    crc, started = 0, time.monotonic()
    with files.atomic_write(path) as out:
        for i, batch in enumerate(rows):
            if i == 0:
                tensors = [
                    ("features", CODES[batch.dtype], (count, *batch.shape[1:])),
                    (kept.CHECK, CODES[torch.int64], (1,)),
                    (TOOK, CODES[torch.float64], (1,)),
                ]
                out.write(files.safetensors_header(tensors, metadata))
            data = batch.contiguous().view(torch.uint8).numpy().data
            crc = zlib.crc32(data, crc)
            out.write(data)
        out.write(crc.to_bytes(8, "little") + struct.pack("<d", time.monotonic() - started))

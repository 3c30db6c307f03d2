"""Images in, batches out: folders, zips, the embedded tasks and whatever `timm.data.create_dataset` reads.

    a folder      train|val|test/CLASS/*, or CLASS/* (then 80/10/10 by a hash of each name)
    .../metadata.csv or .jsonl    of images with several labels each, see `vtzoo._several`
    a .zip        the same, inside
    vtzoo:NAME    an embedded task
    a VTAB-1k task  a folder with train800.txt, val200.txt and test.txt
    torch/… tfds/… wds/… hfds/… hfids/…    timm's readers; `torch/cifar10@DIR` says where the files are

Where a split layout has no `val`, a tenth of `train` (by hash) is held out as one. Order, subsets and augmentation are
pure functions of seed, epoch and place, so a run that is resumed anywhere sees what it would have seen.
"""

import hashlib
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vtzoo import _layout, _lists, _readers, _several
from vtzoo._images import Folder, Images, Tree, Zip, decode
from vtzoo._layout import Split
from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean
from vtzoo.spec import Preprocess

__all__ = ["Images", "embedded_tasks", "loader", "open_data", "open_image", "order", "transforms"]

Augment = Literal["none", "flip", "crop", "strong"]
Transform = Callable[[Image.Image], Tensor]
Batches = DataLoader[tuple[Tensor, Tensor]]
SPLITS = ("train", "val", "test")


def open_data(
    data: str | Path,
    *,
    split: Split,
    skip_bad: bool = False,
    labelled: bool = True,
    several: bool = False,
    side: int = 0,
) -> Images:
    """Open one split of labelled images, or any tree of images when `labelled` is off (all labels -1).

    Args:
        data: a folder, a zip, `vtzoo:NAME`, or a name that timm reads.
        split: which part; unlabelled trees without splits hold out 2 % as `val`.
        skip_bad: leave broken images out (named in `.skipped`) instead of refusing when one is met.
        labelled: whether folders are classes.
        several: whether the caller knows what to do with images of several labels each; see `vtzoo._several`.
        side: pixels that will be needed; lets large JPEGs be decoded at a coarser scale.

    Raises:
        NotFound: no such folder, task or split.
        UsageError: nothing to learn from: empty, one class, or splits whose classes differ; or several labels each.
        Corrupt: a broken image, when it is read.
    """
    text = str(data)
    if split not in SPLITS:
        raise UsageError(f"no split is called '{split}'", did_you_mean(split, SPLITS))
    if text.split("/", 1)[0] in _readers.PREFIXES and not Path(text).exists():
        images = _readers.open_timm(text, split)
    else:
        tree = _tree(text)
        images = _labelled(tree, split, side, several=several) if labelled else _layout.unlabelled(tree, split, side)
    images = images.without_bad() if skip_bad else images
    if not len(images):
        raise UsageError(f"{text} has no whole image in its {split} split", "put images under CLASS folders")
    return images


def _labelled(tree: Tree, split: Split, side: int, *, several: bool) -> Images:
    if (images := _lists.listed(tree, split, side)) is not None:
        return images
    every = tree.names()
    found = _several.several(tree, every, split, side)
    if found is not None and not several:
        raise UsageError(
            f"{tree.where} has images with several labels each, which only train, sweep, eval and predict know",
            "give images in folders by class",
        )
    return _layout.labelled(tree, every, split, side) if found is None else found


def open_image(path: str | Path) -> Image.Image:
    """Read one picture as upright RGB.

    Raises:
        NotFound: there is no such file.
        Corrupt: it isn't a whole image.
    """
    try:
        return decode(Path(path).read_bytes(), str(path))
    except FileNotFoundError as error:
        raise NotFound(f"no image at {path}", "check the path") from error
    except OSError as error:
        raise Corrupt(f"{path} can't be read ({error.strerror})", "give the path of an image file") from error


def embedded_tasks() -> list[str]:
    """The names that stand after `vtzoo:`."""
    return sorted(
        p.name.removesuffix(".zip")
        for p in files("vtzoo").joinpath("embedded/tasks").iterdir()
        if p.name.endswith(".zip")
    )


def transforms(preprocess: Preprocess, *, train: bool, augment: Augment = "flip", crop_area: float = 0.0) -> Transform:
    """Pixels to input as the backbone was trained: its size, crop, interpolation, mean and std; augmented for training.

    none: as in evaluation. flip: and mirrored half the time. crop: a random 35-100 % of the picture, mirrored.
    strong: the same from 20 %, with RandAugment and random erasing. A crop_area above 0 stands for these 35 and 20 %.
    """
    from timm.data import create_transform  # type: ignore[reportMissingTypeStubs, unused-ignore] - timm ships no stubs

    shared: dict[str, Any] = {"input_size": preprocess.input_size, "mean": preprocess.mean, "std": preprocess.std}
    shared |= {"interpolation": preprocess.interpolation}
    create = cast("Callable[..., Transform]", create_transform)
    if not train or augment in ("none", "flip"):
        plain = create(**shared, is_training=False, crop_pct=preprocess.crop_pct, crop_mode=preprocess.crop_mode)
        return _composed(_flipped, plain) if train and augment == "flip" else plain
    strong = augment == "strong"
    more: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25} if strong else {}
    scale = (crop_area or (0.2 if strong else 0.35), 1.0)
    return create(**shared, is_training=True, color_jitter=None, scale=scale, **more)


def _composed(*steps: Callable[[Any], Any]) -> Transform:
    from torchvision.transforms import Compose  # type: ignore[reportMissingTypeStubs, unused-ignore] - torchvision ships no stubs

    return cast("Transform", Compose(steps))


def _flipped(image: Image.Image) -> Image.Image:
    """Mirrored half the time."""
    return _mirrored(image) if _heads() else image


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _heads(generator: torch.Generator | None = None) -> bool:
    return bool(torch.rand(1, generator=generator) < 0.5)


@dataclass(frozen=True)
class Views:
    """Which of few views of each picture an epoch sees: without augmentation there is one, with "flip" there are two.

    Args:
        augment: what is done to the pictures.
        seed: of the draws.
        most: of a random augmentation, so many are drawn and shown in turn; 0 draws a new one each epoch.
        crop_area: see `transforms`.
    """

    augment: Augment
    seed: int
    most: int = 0
    crop_area: float = 0.0

    @property
    def count(self) -> int:
        """How many there are; 0 where they are without number."""
        return {"none": 1, "flip": 2}.get(self.augment, self.most)

    def draw(self, epoch: int) -> int:
        """The seed of an epoch's random numbers."""
        return mixed(self.seed, epoch % self.most if self.most else epoch)

    def __call__(self, epoch: int, index: int) -> int:
        """The number of the view of one picture in one epoch."""
        if self.augment == "flip":
            return int(_heads(torch.Generator().manual_seed(mixed(self.draw(epoch), index))))
        return epoch % self.most if self.augment != "none" else 0

    def transform(self, preprocess: Preprocess, view: int) -> tuple[Transform, int | None]:
        """Pixels to input for one view, and the seed of its random numbers."""
        if self.augment in ("none", "flip"):
            return _composed(*[_mirrored] * view, transforms(preprocess, train=False)), None
        drawn = transforms(preprocess, train=True, augment=self.augment, crop_area=self.crop_area)
        return drawn, mixed(self.seed, view)

    def facts(self, view: int) -> list[Any]:
        """What one view depends on."""
        return [view] if self.augment in ("none", "flip") else [self.augment, self.seed, view, self.crop_area]


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The places 0 … count-1 shuffled; a function of its arguments alone."""
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return cast("list[int]", torch.randperm(count, generator=generator).tolist())


def loader(
    images: Images,
    transform: Transform,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    workers: int = 0,
    start: int = 0,
    drop_last: bool = False,
    views: int = 0,
    places: Sequence[int] | None = None,
    part: Callable[[list[int]], list[int]] = list,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (input [n, c, h, w], label [n]) for one epoch.

    With a seed the order and each picture's augmentation follow from seed, epoch and place, whatever the number of
    workers; without one the order is as stored. `start` leaves out that many batches (to resume inside an epoch);
    `views` augmentations of each picture are shown in turn, where it isn't 0 for a new one each epoch; `places` are shown in
    their order instead. `part` says which places of a batch are read here, where several processes share it.
    """
    if places is None:
        places = list(range(len(images))) if seed is None else order(len(images), seed, epoch)
    ready = Seeded(images, transform, None if seed is None else mixed(seed, epoch % views if views else epoch))
    left = BatchSampler(places[start * batch_size :], batch_size, drop_last)
    return DataLoader(ready, batch_sampler=[part(own) for own in left], num_workers=workers)  # type: ignore[return-value] - labels are collated


@dataclass(frozen=True)
class Seeded(Dataset[tuple[Tensor, int | Tensor]]):
    """Transformed images; with a seed, each draws random numbers of its own."""

    images: Images
    transform: Transform
    seed: int | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        image, label = self.images[index]
        if self.seed is None:
            return self.transform(image), label
        with seeded(mixed(self.seed, index)):
            return self.transform(image), label


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed the three generators that transforms draw from, and give them back as they were.

    `torch.manual_seed` would also note the seed for every kind of device, with a stack trace each time, and keep them all.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the global one is timm's
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def mixed(*numbers: int) -> int:
    """63 bits that depend on every number."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def _tree(text: str) -> Tree:
    if text.startswith("vtzoo:"):
        name = text.removeprefix("vtzoo:")
        if name not in (known := embedded_tasks()):
            raise NotFound(f"no embedded task is called '{name}'", did_you_mean(name, known))
        return Zip(Path(str(files("vtzoo").joinpath(f"embedded/tasks/{name}.zip"))), name=text)
    path = Path(text).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return Zip(path)
    if path.exists():
        raise UsageError(f"{text} is neither a folder of images nor a zip of one", "give the folder above the classes")
    raise NotFound(
        f"no folder of images at {text}",
        f"give a folder, or one of {', '.join('vtzoo:' + n for n in embedded_tasks())}",
    )

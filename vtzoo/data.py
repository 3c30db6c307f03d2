"""Labelled images from folders, from the tasks inside the package, and from anything timm's readers open.

Order and augmentation are pure functions of (seed, epoch, index), so a run can be taken up at any step.
"""

import hashlib
import io
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean
from vtzoo.spec import Preprocess

Split = Literal["train", "val", "test"]
SPLITS: dict[str, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
EMBEDDED = "vtzoo:"
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class Images(Dataset[tuple[Image.Image, int]]):
    """Images and their labels; an item is (RGB image, label), label -1 where there is none.

    Attributes:
        names: what to call each image in an error (a path).
        labels: class index by image.
        classes: label names in order.
        read: gives an image's bytes.
        skipped: names of broken images that were left out.
    """

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    read: Callable[[int], bytes]
    digest: str = ""
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            with Image.open(io.BytesIO(self.read(index))) as image:
                return _rgb(image), self.labels[index]
        except _BROKEN as error:
            raise Corrupt(f"{self.names[index]} is not a readable image: {error}", "remove it, or pass --skip-bad") from error

    def subset(self, keep: Sequence[int]) -> "Images":
        """Some of the images, in the order given."""
        order = list(keep)
        return Images(
            [self.names[i] for i in order], [self.labels[i] for i in order], self.classes,
            lambda i: self.read(order[i]), self.digest, self.skipped,
        )  # fmt: skip

    def limited(self, count: int, seed: int = 0) -> "Images":
        """At most `count` images, as evenly over the classes as they allow; the same for the same seed."""
        if not count or count >= len(self):
            return self
        shuffled = list(range(len(self)))
        random.Random(seed).shuffle(shuffled)
        rank: Counter[int] = Counter()
        keyed: list[tuple[int, int]] = []
        for i in shuffled:
            keyed.append((rank[self.labels[i]], i))
            rank[self.labels[i]] += 1
        return self.subset(sorted(i for _, i in sorted(keyed)[:count]))

    def checked(self) -> "Images":
        """Without the broken images; their names are in `skipped`."""
        good: list[int] = []
        bad: list[str] = []
        for i in range(len(self)):
            try:
                self[i]
            except Corrupt:
                bad.append(self.names[i])
            else:
                good.append(i)
        left = self.subset(good)
        left.skipped = bad
        return left


def open_data(data: str, *, split: Split = "train", skip_bad: bool = False, labelled: bool = True) -> Images:
    """Open one split of a data source.

    Args:
        data: a folder (train|val|test/CLASS/*, or CLASS/* which is split 80/10/10 by name), `vtzoo:NAME` for a task inside
            the package, or what `timm.data.create_dataset` reads (hfds/…, wds/…, torch/…, tfds/…).
        split: which part; where a source has no validation split, a tenth of its training images.
        skip_bad: leave out broken images (their names are in `.skipped`) instead of failing when one is read.
        labelled: False takes every image below a folder, without labels.

    Raises:
        NotFound: no such folder, task or split.
        UsageError: no images, one class only, or other classes than in the training split.
    """
    if data.startswith(EMBEDDED):
        images = _embedded(data.removeprefix(EMBEDDED), split)
    elif data.split("/", 1)[0] in ("hfds", "hfids", "wds", "tfds", "torch"):
        images = _timm(data, split)
    else:
        images = _folder(Path(data).expanduser(), split, labelled=labelled)
    images = images.checked() if skip_bad else images
    if not len(images):
        raise UsageError(f"{data} has no images in its {split} split", "put them in train/CLASS/, val/CLASS/ and test/CLASS/")
    if labelled and len(images.classes) < 2:  # noqa: PLR2004 - one class teaches nothing
        raise UsageError(f"{data} has one class only ({images.classes[0]})", "put each class in a folder of its own")
    return images


def has_split(data: str, split: Split) -> bool:
    """Whether a source has this split (or one made from its training images)."""
    try:
        open_data(data, split=split)
    except (NotFound, UsageError):
        return False
    return True


def transforms(preprocess: Preprocess, *, train: bool = False, augment: str = "none") -> Callable[[Image.Image], Tensor]:
    """A backbone's own preprocessing, with augmentation for training; image -> [3, height, width].

    Args:
        preprocess: size, mean, std, interpolation and crop.
        train: apply `augment`.
        augment: none, flip, crop (random resized crop and flip) or strong (RandAugment and erasing besides).
    """
    shared: dict[str, Any] = {
        "input_size": preprocess.input_size, "interpolation": preprocess.interpolation, "mean": preprocess.mean,
        "std": preprocess.std, "crop_pct": preprocess.crop_pct, "crop_mode": preprocess.crop_mode, "normalize": True,
    }  # fmt: skip
    if train and augment in ("crop", "strong"):
        strong = {"auto_augment": "rand-m7-mstd0.5-inc1", "re_prob": 0.1} if augment == "strong" else {"color_jitter": None}
        return create_transform(**shared, is_training=True, scale=(0.35, 1.0), **strong)
    plain = create_transform(**shared, is_training=False)
    return v2.Compose([v2.RandomHorizontalFlip(), plain]) if train and augment == "flip" else plain


def batches(
    images: Images, transform: Callable[[Image.Image], Tensor], *, batch_size: int, seed: int = 0, epoch: int = 0,
    shuffle: bool = False, start: int = 0, workers: int = 0, even: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Batches of ([n, 3, h, w], [n]) from step `start` on.

    Args:
        images: the source.
        transform: image -> tensor.
        batch_size: images per batch; the last one may be smaller, or is left out with `even`.
        seed: with `epoch` decides order and augmentation.
        epoch: see `seed`.
        shuffle: draw an order; otherwise as stored.
        start: batches to leave out at the beginning, without decoding them.
        workers: processes that decode.
        even: only full batches of an even size (mixup pairs images).
    """
    order = list(range(len(images)))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if even:
        groups = [g[: len(g) // 2 * 2] for g in groups if len(g) > 1]
    source = _Seeded(images, transform, f"{seed}/{epoch}")
    yield from DataLoader(source, batch_sampler=groups[start:], num_workers=workers)  # type: ignore[arg-type] - a list of lists is a sampler


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Transformed images, each under random numbers of its own."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], key: str) -> None:
        self.images, self.transform, self.key = images, transform, key

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        seed = int.from_bytes(hashlib.blake2b(f"{self.key}/{index}".encode(), digest_size=6).digest(), "big")
        random.seed(seed)
        torch.manual_seed(seed)
        return self.transform(image), label


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _folder(root: Path, split: Split, *, labelled: bool) -> Images:
    if not root.is_dir():
        raise NotFound(f"no folder {root}", "give a folder of images, vtzoo:NAME, or hfds/NAME")
    if not labelled:
        return _listed(root, sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES), None)
    present = {s: next((root / n for n in names if (root / n).is_dir()), None) for s, names in SPLITS.items()}
    train = present["train"]
    if train is None:
        return _cut(_listed(root, _paths(root), _classes(root)), split, (8, 9))
    classes = _classes(train)
    where = present[split]
    if where is None and split == "test":
        raise NotFound(f"{root} has no test folder", "add test/CLASS/*, or leave the test out")
    if where is None or (split == "train" and present["val"] is None):
        return _cut(_listed(root, _paths(train), classes), split, (9, 10))
    if other := set(_classes(where)) - set(classes):
        raise UsageError(f"{where} has classes that {train.name} lacks: {', '.join(sorted(other)[:3])}", "use the same class folders in every split")
    return _listed(root, _paths(where), classes)


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _paths(folder: Path) -> list[Path]:
    return sorted(p for c in _classes(folder) for p in (folder / c).rglob("*") if p.suffix.lower() in SUFFIXES)


def _listed(root: Path, paths: list[Path], classes: tuple[str, ...] | None) -> Images:
    index = {c: i for i, c in enumerate(classes or ())}
    labels = [next((index[part] for part in reversed(p.relative_to(root).parts[:-1]) if part in index), -1) for p in paths]
    digest = hashlib.sha256("\n".join(f"{p.relative_to(root).as_posix()} {p.stat().st_size}" for p in paths).encode())
    return Images([str(p) for p in paths], labels, classes or (), lambda i: paths[i].read_bytes(), digest.hexdigest())


def _cut(images: Images, split: Split, tenths: tuple[int, int]) -> Images:
    """Make splits from one pool, by a hash of each image's name: train below the first tenth, val below the second."""

    def side(name: str) -> Split:
        draw = hashlib.blake2b(Path(name).name.encode(), digest_size=4).digest()[0] % 10
        return "train" if draw < tenths[0] else "val" if draw < tenths[1] else "test"

    return images.subset([i for i, n in enumerate(images.names) if side(n) == split])


def _embedded(task: str, split: Split) -> Images:
    folder = files("vtzoo") / "embedded" / "tasks"
    known = sorted(p.name.removesuffix(".zip") for p in folder.iterdir() if p.name.endswith(".zip")) if folder.is_dir() else []
    if task not in known:
        raise NotFound(f"no embedded task '{task}'", did_you_mean(task, known))
    with as_file(folder / f"{task}.zip") as path:
        archive = zipfile.ZipFile(path)
    every = sorted(n for n in archive.namelist() if Path(n).suffix in SUFFIXES)
    classes = tuple(sorted({n.split("/")[1] for n in every}))
    names = [n for n in every if n.startswith(split + "/")]
    digest = hashlib.sha256("\n".join(f"{n} {archive.getinfo(n).CRC}" for n in names).encode()).hexdigest()
    return Images(names, [classes.index(n.split("/")[1]) for n in names], classes, lambda i: archive.read(names[i]), digest)


def _timm(data: str, split: Split) -> Images:
    try:
        source = create_dataset(data, root=None, split={"val": "validation"}.get(split, split), download=False)
    except Exception as error:  # any reader's own refusal, in its words
        raise NotFound(f"{data} could not be opened: {error}", "is the data set's package installed, and its cache filled?") from error
    reader: Any = getattr(source, "reader", source)
    labels = [int(source[i][1]) for i in range(len(source))]
    names = getattr(reader, "class_to_idx", None) or {str(c): c for c in sorted(set(labels))}

    def read(i: int) -> bytes:
        out = io.BytesIO()
        source[i][0].save(out, "PNG")
        return out.getvalue()

    return Images([f"{data}#{i}" for i in range(len(source))], labels, tuple(sorted(names, key=names.__getitem__)), read, hashlib.sha256(f"{data}/{split}/{len(source)}".encode()).hexdigest())

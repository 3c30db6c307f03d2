"""Where images come from (a folder, a zip, a timm reader), how one is decoded, and the labelled sequence of them."""

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vtzoo.errors import Corrupt, Mismatch, VtzooError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CACHE_BYTES = 512 * 2**20
IMAGE_BYTES = 256 * 2**20
"""Of one encoded image in a zip file; the largest photos have a tenth."""
# what Pillow's plugins raise on damaged files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Tree(Protocol):
    """A set of named files: relative names with forward slashes."""

    @property
    def where(self) -> str:
        """What to call it in a message."""
        ...

    def names(self) -> list[str]:
        """Every image's name."""
        ...

    def read(self, name: str) -> bytes:
        """One file's bytes."""
        ...

    def checksum(self, name: str) -> str:
        """CRC-32 and size of one file's bytes; the same for a folder and for the zip packed from it."""
        ...


@dataclass(frozen=True)
class Folder:
    """The images below a folder; hidden files and other suffixes are passed over, links followed."""

    root: Path

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.root)

    def names(self) -> list[str]:
        """Every image's name; links are followed."""
        found: list[str] = []
        above = {str(self.root): frozenset({os.path.realpath(self.root)})}  # the real folders on the way to each place
        for place, folders, names in os.walk(self.root, followlinks=True):
            way = above.pop(place)
            real = {f: os.path.realpath(Path(place, f)) for f in folders if not _hidden((f,))}
            folders[:] = [f for f in real if real[f] not in way]  # a link back up would lead round for ever
            above |= {os.path.join(place, f): way | {real[f]} for f in folders}  # noqa: PTH118 - as os.walk spells it
            images = [n for n in names if n[n.rfind(".") :].lower() in SUFFIXES and not _hidden((n,))]
            images = [n for n in images if os.path.isfile(f"{place}/{n}")]  # noqa: PTH113 - no Path for each of a million
            below = "" if place == str(self.root) else f"{Path(place).relative_to(self.root).as_posix()}/"
            found += [f"{below}{n}" for n in images]
        return found

    def read(self, name: str) -> bytes:
        """One file's bytes."""
        return (self.root / name).read_bytes()

    def checksum(self, name: str) -> str:
        """CRC-32 and size of one file's bytes, which are read for it."""
        data = _read(self, name)
        return f"{zlib.crc32(data):08x} {len(data)}"


@dataclass
class Zip:
    """The images inside a zip file, read in place."""

    path: Path
    name: str = ""

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return self.name or str(self.path)

    @cached_property
    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(io.BytesIO(self.path.read_bytes()))
        except (OSError, zipfile.BadZipFile) as error:
            raise Corrupt(f"{self.path} can't be read as a zip file ({error})", "download or pack it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}

    def names(self) -> list[str]:
        """Every image's name."""
        found = [n for n in dict.fromkeys(self._open.namelist()) if Path(n).suffix.lower() in SUFFIXES]
        return [n for n in found if not _hidden(Path(n).parts)]

    def read(self, name: str) -> bytes:
        """One file's bytes."""
        size_bytes = self._open.getinfo(name).file_size
        if size_bytes > IMAGE_BYTES:  # a few bytes may stand for very many
            raise Corrupt(f"{self.where}: {name} has {size_bytes} bytes", "is it an image? take it out")
        return self._open.read(name)

    def checksum(self, name: str) -> str:
        """CRC-32 and size as the zip's directory has them; nothing is read."""
        info = self._open.getinfo(name)
        return f"{info.CRC:08x} {info.file_size}"


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def decode(data: bytes, name: str, side: int = 0) -> Image.Image:
    """Decode to upright RGB, transparency over white.

    `side` in pixels lets a large JPEG be read at a coarser scale that still covers it.

    Raises:
        Corrupt: it isn't an image, or only part of one; the message names it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if side:
                image.draft("RGB", (side, side))
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        why = ("no known format" if data else "it is empty") if unknown else " ".join(str(error).split())[:120]
        raise Corrupt(f"{name} is not a whole image ({why})", "remove or replace it, or pass --skip-bad") from error


@dataclass(frozen=True)
class Decoder:
    """Reads and decodes the named images of a tree."""

    tree: Tree
    side: int = 0

    def __call__(self, name: str) -> Image.Image:
        return decode(_read(self.tree, name), f"{self.tree.where}/{name}", self.side)


def _read(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise Corrupt(f"{tree.where}: {name} can't be read ({error})", "check the file, or pass --skip-bad") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.point(lambda v: v / 256).convert("L").convert("RGB")  # type: ignore[operator] - a linear scale in place of a table
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass(eq=False)
class Images(Dataset[tuple[Image.Image, int | Tensor]]):
    """Labelled images, decoded when asked for; small sets stay decoded in memory. Label -1 means unlabelled.

    Where an image may bear several labels, or none, `several` has them, and what is asked for comes with 1 for each of its
    classes and 0 for the others, [classes].

    `paths` name the images, `skipped` are the broken ones left out, `identity` turns paths into what `digest` hashes; `exact` says
    whether that stands for what is in the images, too.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    identity: Callable[[Sequence[str]], Iterable[str]]
    load: Callable[[str], Image.Image]
    skipped: tuple[str, ...] = ()
    where: str = ""
    exact: bool = True
    several: tuple[tuple[int, ...], ...] = ()
    _cache: dict[str, Image.Image] = field(default_factory=dict[str, Image.Image], repr=False)
    _cached_bytes: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def targets(self) -> Tensor:
        """What is to be learned of each image: its class, [n], or of several labels 1 for each, [n, classes]."""
        if not self.several:
            return torch.tensor(self.labels)
        found = torch.zeros(len(self), len(self.classes))
        for row, own in zip(found, self.several, strict=True):
            row[list(own)] = 1
        return found

    def __getitem__(self, index: int) -> tuple[Image.Image, int | Tensor]:
        return self.picture(index), self._targets[index] if self.several else self.labels[index]

    def picture(self, index: int) -> Image.Image:
        """One image without what it shows."""
        path = self.paths[index]
        image = self._cache.get(path)
        if image is None:
            image = self.load(path)
            size = 3 * image.width * image.height
            if get_worker_info() is None and self._cached_bytes + size <= CACHE_BYTES:
                self._cache[path] = image
                self._cached_bytes += size
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    @cached_property
    def _targets(self) -> Tensor:
        return self.targets

    @cached_property
    def digest(self) -> str:
        """Sha256 that stands for these images, whatever their order; found out when first asked for.

        Of a folder or zip it stands for names and contents (by CRC-32 and size: it tells sets apart and is no proof
        against forgery); of a timm data set for what `_readers` says. A folder's files are read for it once (20,000 of
        15 kB in 0.4 s, when the system has them in memory), a zip's are not.
        """
        return hashlib.sha256("\n".join(sorted(self.identity(self.paths))).encode()).hexdigest()

    @cached_property
    def pixels(self) -> str:
        """Sha256 that other pixels would change: `digest` where that is exact, else of the decoded images, each read for it."""
        if self.exact:
            return self.digest
        found = hashlib.sha256()
        for path in self.paths:
            image = self.load(path)
            found.update(f"{path} {image.size} {image.mode}\n".encode() + image.tobytes())
        return found.hexdigest()

    @cached_property
    def ordered(self) -> str:
        """Sha256 that other pixels or another order of the images would change."""
        return hashlib.sha256("\n".join((self.pixels, *self.paths)).encode()).hexdigest()

    def take(self, indices: Iterable[int]) -> "Images":
        """The images at these places, in this order."""
        chosen = list(indices)
        paths, labels = tuple(self.paths[i] for i in chosen), tuple(self.labels[i] for i in chosen)
        several = tuple(self.several[i] for i in chosen) if self.several else ()
        return replace(self, paths=paths, labels=labels, several=several, _cache={}, _cached_bytes=0)

    def limit(self, count: int, seed: int = 0) -> "Images":
        """A class-balanced subset of `count` images, the same for the same seed; 0 or more than there are means all."""
        if count <= 0 or count >= len(self):
            return self
        rank = [hashlib.sha256(f"{seed}/{path}".encode()).digest() for path in self.paths]
        by_class: dict[int, list[int]] = {}
        for i in sorted(range(len(self)), key=rank.__getitem__):
            by_class.setdefault(self.labels[i], []).append(i)
        rounds = sorted((turn, rank[i], i) for members in by_class.values() for turn, i in enumerate(members))
        return self.take(sorted(i for _, _, i in rounds[:count]))

    def aligned(self, classes: Sequence[str]) -> "Images":
        """The same images with labels counted in another order of the same classes (a trained head's).

        Raises:
            Mismatch: a class here isn't among those.
        """
        if missing := [c for c in self.classes if c not in classes]:
            names = ", ".join(missing[:5])
            raise Mismatch(
                f"{self.where} has classes the task doesn't know: {names}", f"the task knows: {', '.join(classes[:12])}"
            )
        place = [list(classes).index(c) for c in self.classes]
        several = tuple(tuple(sorted(place[y] for y in own)) for own in self.several)
        labels = tuple(y if y < 0 else place[y] for y in self.labels)
        return replace(self, classes=tuple(classes), labels=labels, several=several)

    def without_bad(self) -> "Images":
        """The same without the images that can't be decoded; `skipped` names those."""
        bad = {path for path in self.paths if not self._whole(path)}
        kept = self.take(i for i, path in enumerate(self.paths) if path not in bad) if bad else self
        kept.skipped = tuple(sorted(bad))
        return kept

    def _whole(self, path: str) -> bool:
        try:
            self.load(path)
        except VtzooError:
            return False
        return True


@dataclass(frozen=True)
class Contents:
    """The identity of a tree's files, one line each: name, checksum, and the label where no folder says it."""

    tree: Tree
    labels: Mapping[str, str] = field(default_factory=dict[str, str])

    def __call__(self, names: Sequence[str]) -> Iterable[str]:
        return (" ".join((n, self.tree.checksum(n), *([self.labels[n]] if self.labels else []))) for n in names)

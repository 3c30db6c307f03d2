"""Data sets that timm reads (`hfds/`, `hfids/`, `wds/`, `tfds/`, `torch/`), as `Images`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from vtzoo._images import Images
from vtzoo.errors import Corrupt, Network, NotFound, UsageError
from vtzoo.refs import as_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
_NEEDS = {
    "hfds": "vtzoo[hfds]",
    "hfids": "vtzoo[hfds]",
    "tfds": "tensorflow-datasets",
    "wds": "webdataset",
    "torch": "torchvision",
}
_SPLITS = {"train": ("train", "train800"), "val": ("validation", "val", "val200"), "test": ("test",)}
"""What data sets call their splits; the last ones VTAB-1k's."""


@dataclass(frozen=True)
class Reader:
    """Gives the pictures of an indexable timm data set by their number; `root` is its folder, if one was said."""

    source: Any
    root: str
    labels: "Sequence[int]"

    def __call__(self, path: str) -> Image.Image:
        number = int(path.rsplit("#", 1)[1])
        try:
            return cast("Image.Image", self.source[number][0]).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise Corrupt(f"{path} is not a whole image ({error})", "remove it, or pass --skip-bad") from error

    def identity(self, paths: "Sequence[str]") -> "Iterable[str]":
        """What `Images.digest` stands for here: data set, folder, split, length and labels; not the pixels."""
        yield f"{len(self.labels)} images in {Path(self.root).expanduser().resolve() if self.root else 'their own place'}"
        for path in paths:
            yield f"{path} {self.labels[int(path.rsplit('#', 1)[1])]}"


def open_timm(text: str, split: str) -> Images:
    """Open `PREFIX/NAME[@DIR]`; timm names the readers and their formats.

    Raises:
        UsageError: the reader's package isn't installed, or fewer than two classes came.
        NotFound: timm knows no such data set, or it has no such split, or the folder of a `wds/` isn't there.
        Network: it had to be fetched and could not be.
    """
    name, _, root = text.partition("@")
    if name.startswith("wds/"):
        root = _shards(root)
    source = _create(name, root, split)
    if not hasattr(type(source), "__getitem__"):
        source = [(image, label) for image, label in cast("Iterable[tuple[Image.Image, int]]", source)]
    labels = _labels(source)
    classes = _classes(source, labels)
    if len(classes) < 2:
        raise UsageError(f"{text} has {len(classes)} classes in its {split} split", "a task needs two classes or more")
    reader = Reader(source, root, labels)
    paths = tuple(f"{name}/{split}#{i:07d}" for i in range(len(labels)))
    return Images(
        classes=classes,
        paths=paths,
        labels=tuple(labels),
        identity=reader.identity,
        load=reader,
        where=text,
        exact=False,
    )


def _shards(root: str) -> str:
    """A folder's whole path: what else webdataset opens (`pipe:…`, URLs) it gives to a shell.

    Raises:
        NotFound: there is no such folder.
    """
    if not root or not as_path(root).is_dir():
        raise NotFound(f"wds/ reads a folder of shards, not '{root}'", "say where it is: wds/NAME@DIR")
    return str(as_path(root).resolve())


def _create(name: str, root: str, split: str) -> Any:
    from timm.data import create_dataset  # type: ignore[reportMissingTypeStubs, unused-ignore] - timm ships no stubs

    create = cast("Any", create_dataset)
    prefix, reason = name.split("/", 1)[0], ""
    for word in _SPLITS[split]:
        try:
            return create(name, root=root or None, split=word, is_training=False, download=False)
        except ImportError as error:
            raise UsageError(
                f"{name} needs a package that isn't installed ({error})", f"pip install '{_NEEDS[prefix]}'"
            ) from error
        except (ConnectionError, TimeoutError) as error:
            raise Network(
                f"{name} could not be fetched ({error})", "check the connection, or use a local copy"
            ) from error
        except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
    raise NotFound(
        f"timm can't open the {split} split of {name} ({reason or 'no such data set'})",
        "check the name; say where the files are as NAME@DIR",
    )


def _labels(source: Any) -> list[int]:
    """Labels without decoding where the data set holds them apart."""
    for name in ("targets", "labels"):
        held = getattr(source, name, None)
        if held is not None and len(held) == len(source):
            return [int(y) for y in held]
    samples = getattr(source, "samples", None) or getattr(getattr(source, "reader", None), "samples", None)
    if samples is not None:
        return [int(s[1]) for s in cast("Sequence[Any]", samples)]
    return [int(source[i][1]) for i in range(len(source))]


def _classes(source: Any, labels: list[int]) -> tuple[str, ...]:
    reader = getattr(source, "reader", source)
    by_name = getattr(source, "class_to_idx", None) or getattr(reader, "class_to_idx", None)
    if by_name:
        return tuple(sorted(by_name, key=by_name.__getitem__))
    names = getattr(source, "classes", None)
    return tuple(str(n) for n in names) if names else tuple(str(i) for i in range(max(labels, default=-1) + 1))

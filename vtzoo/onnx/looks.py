"""Which real images an export looks at: some to find ranges, others to verify with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtzoo import data as D
from vtzoo.errors import NotFound, UsageError
from vtzoo.onnx.verify import BATCHES
from vtzoo.spec import Preprocess

CALIBRATE, FEW, VERIFIED, LARGEST = 100, 32, 128, 16
"""So many images find ranges unless another number is given; fewer held out than this verify nothing by themselves; so many verify; so many at most are in a batch."""


@dataclass(frozen=True, slots=True)
class Look:
    """Images as the network takes them, read anew each time: batches [n, 3, h, w] with n of 1, 2, 5, then 16; few come round again."""

    images: D.Images
    transform: D.Transform

    def __iter__(self) -> Iterator[Tensor]:
        place, every = 0, len(self.images)
        for count in _counts(every):
            yield torch.stack([self.transform(self.images[i % every][0]) for i in range(place, place + count)])
            place += count

    def few(self, count: int) -> "Look":
        """The same of fewer images."""
        return Look(self.images.limit(count), self.transform)


def _counts(images: int) -> Iterator[int]:
    """Batch sizes that add up to so many images, or to what BATCHES do if that is more."""
    yield from BATCHES
    for start in range(sum(BATCHES), images, LARGEST):
        yield min(LARGEST, images - start)


def looks(data: str, preprocess: Preprocess, calibrate: int) -> tuple[Look, Look]:
    """Images to find ranges with, of the training split, and images to verify with, of none that those are.

    Verified is on the test split, else the validation split, else what is left of the training images. Where that is less than
    FEW, it is on the very images that the ranges are of.

    Args:
        data: as `open_data` takes it; labels don't matter.
        preprocess: what becomes of them.
        calibrate: how many find ranges.

    Raises:
        NotFound: there are none of that name.
        UsageError: no images.
        Corrupt: a broken one.
    """
    every = D.open_data(data, split="train", labelled=False)
    chosen = every.limit(calibrate)
    held = _held(data)
    if held is None or len(held) < FEW:
        taken = set(chosen.paths)
        left = [i for i, path in enumerate(every.paths) if path not in taken]
        held = every.take(left) if len(left) >= FEW else chosen
    held, transform = held.limit(VERIFIED), D.transforms(preprocess, train=False)
    for images in (chosen, held):
        for place in range(len(images)):
            _ = images[place]  # a broken one is met now, not after the network was translated
    return Look(chosen, transform), Look(held, transform)


def _held(data: str) -> D.Images | None:
    splits: Sequence[D.Split] = ("test", "val")
    for split in splits:
        try:
            return D.open_data(data, split=split, labelled=False)
        except (NotFound, UsageError):  # no such split, or nothing in it
            continue
    return None

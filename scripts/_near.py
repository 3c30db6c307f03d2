"""Tell whether a picture is nearly the same as one of a set, whatever its name: a guard between splits."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TOLERANCE = 6.0  # mean difference in grey levels of 12 x 12 RGB thumbnails


@dataclass(slots=True)
class Known:
    """Thumbnails of the pictures seen so far."""

    rows: list[NDArray[np.float32]] = field(default_factory=list)
    table: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 432), np.float32))

    def add(self, image: Image.Image) -> None:
        """Remember an opaque picture."""
        self.rows.append(_thumbnail(image))

    def has(self, image: Image.Image) -> bool:
        """Whether a nearly equal picture was added."""
        if self.rows:
            self.table = np.concatenate([self.table, np.stack(self.rows)])
            self.rows.clear()
        return bool(len(self.table)) and float(np.abs(self.table - _thumbnail(image)).mean(1).min()) < TOLERANCE


def _thumbnail(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BOX), np.float32).ravel()

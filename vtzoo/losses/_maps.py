"""What losses on maps share."""

from torch import Tensor
from torch.nn import functional as F

from vtzoo.losses._outputs import wide


def resized(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[batch, channels, h, w] -> [batch, channels, *size], smoothed where it shrinks."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(wide(maps), size, mode=mode, align_corners=False, antialias=True)

"""Resize: the same network for another grid of patches, patch size, window, image channels or classes (Beyer et al. 2022, FlexiViT, arXiv:2212.08013).

    patches      w' = pinv(B^T) w,   B the resize of a patch as a matrix: <B x, w'> is <x, w>, or as near to it as can be
    positions    bicubic resampling of the grid; class token and registers stay
    windows      BEiT's and Swin's tables of relative positions, resampled by geometric distances
    channels     one: the sum; more: repeated, times 3 / channels
    head         rows of shared labels stay, new labels keep the student's first values

Exact where sizes agree. Shapes: widths and depths are the source's.
"""

from collections.abc import Mapping

from torch import Tensor

from vtzoo.errors import ShapeMismatch
from vtzoo.inits._plan import Plan, kin, names
from vtzoo.inits._remap import kept, remapped

PAPER = "arXiv:2212.08013"


def resize(source: Mapping[str, Tensor], target: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Resample.

    Args:
        source: the tensors of a network of the student's widths and depths.
        target: the student's present ones.
        plan: of both.

    Raises:
        ShapeMismatch: another width or depth, or another family.
    """
    return remapped(source, target, plan, names(plan, kin(plan, _equal)), kept)


def _equal(there: int, here: int) -> list[int]:
    if there != here:
        raise ShapeMismatch(
            f"a stage has {there} blocks in the source and {here} in the student: this way changes no depth",
            "take weight-selection, net2net or fna",
        )
    return list(range(here))

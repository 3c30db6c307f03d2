"""FNA: kernels, widths and depths of another size are mapped one by one (Fang et al. 2020, arXiv:2001.02525).

    depth     blocks past a stage's last start from that last one
    width     the first channels
    kernel    the middle of a larger one; a smaller one with zeros around it

Shapes: any of one family.
Departs from the authors' code, where more channels than the source's are zero in the layer that gives them and in the one that takes them, so that no gradient ever
moves either: here they keep the student's own first values in the layer that gives, and are zero in the one that takes. Heads and the parts of a fused
qkv are mapped each by itself; positions and patches are resampled; the head's rows go by label.
"""

from collections.abc import Mapping

from torch import Tensor

from vtzoo.axes import IN
from vtzoo.inits._plan import Plan, kin, names
from vtzoo.inits._remap import Width, remapped

PAPER = "arXiv:2001.02525"


def fna(source: Mapping[str, Tensor], target: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Map.

    Args:
        source: the tensors of a network of any size.
        target: the student's present ones.
        plan: of both.

    Raises:
        ShapeMismatch: the student is of another family.
    """
    blocks = kin(plan, lambda there, here: [min(i, there - 1) for i in range(here)])
    return remapped(source, target, plan, names(plan, blocks), _first)


def _first(width: Width) -> Tensor:
    """The first of each part; what is more, zeros to sum over and the student's own to give."""
    old, new = width.parts
    value, behind = width.value, width.like.shape[width.dim + 1 :]
    if old == new or value.shape[width.dim + 1 :] != behind:
        return value
    shape = (*value.shape[: width.dim], width.new.size, *behind)
    own = width.new.kind != IN and width.like.shape == shape
    grown = width.like.detach().clone() if own else value.new_zeros(shape)
    corner = (slice(None),) * width.dim + tuple(slice(min(a, b)) for a, b in zip(old, new, strict=True))
    grown.unflatten(width.dim, new)[corner] = value.unflatten(width.dim, old)[corner]
    return grown

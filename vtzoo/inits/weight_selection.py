"""Weight selection: a smaller network starts from elements of a larger one's weights (Xu et al. 2023, arXiv:2311.18823).

    w = W[i_1, i_2, …],   i_d = 0, k, 2k, … for k = N_d / n_d        (uniform; evenly spaced and rounded where k is no whole number)

Layers: the first n of each stage, or evenly spaced ones. Shapes: any, each dimension as long as the student's or longer.
Departs from the paper: a fused qkv is taken apart into queries, keys and values and these into heads, a gated unit into its two halves, so that heads stay
whole and what is added stays matched; positions and patches of another size are resampled, kernels of another size cut around their middle; the head's
rows go by label.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

from torch import Tensor

from vtzoo.errors import ShapeMismatch
from vtzoo.inits._plan import Plan, evenly, kin, names
from vtzoo.inits._remap import Width, picked, remapped, wrong

PAPER = "arXiv:2311.18823"


def weight_selection(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    plan: Plan,
    *,
    layers: Literal["first", "uniform"] = "first",
    elements: Literal["uniform", "first"] = "uniform",
) -> dict[str, Tensor]:
    """Select.

    Args:
        source: the larger network's tensors.
        target: the student's present ones.
        plan: of both.
        layers: which blocks of each stage.
        elements: which channels of each dimension.

    Raises:
        ShapeMismatch: the student is the larger one somewhere, or of another family.
    """

    def blocks(many: int, few: int) -> list[int]:
        if few > many:
            raise ShapeMismatch(
                f"a stage has {many} blocks in the source and {few} in the student: there are too few to select from",
                "take net2net or fna, which add blocks",
            )
        return list(range(few)) if layers == "first" else evenly(many, few)

    return remapped(source, target, plan, names(plan, kin(plan, blocks)), partial(_selected, first=elements == "first"))


def _selected(width: Width, *, first: bool) -> Tensor:
    if any(a < b for a, b in zip(*width.parts, strict=True)):
        raise wrong(width, "there are too few to select from", "take net2net or fna, which widen")
    return picked(width, lambda many, few: list(range(few)) if first else evenly(many, few))

"""Which layers stay float: those whose quantisation moves the outputs most, as few as let the rest pass.

The cost of a layer is how far the outputs move when it alone is quantised. If all at once move them too far, the costliest stay
float: one, two, four … until the outputs are near enough, then as few as a bisection finds.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from vtzoo import talk
from vtzoo.errors import ExportMismatch

if TYPE_CHECKING:
    from onnx import ModelProto

Make = Callable[[Collection[str]], "ModelProto"]
Apart = Callable[["ModelProto"], float]


def quantised(
    layers: Sequence[str], make: Make, apart: Apart, few: Apart, allowed: float
) -> tuple["ModelProto", list[str]]:
    """Quantise as many layers as the tolerance lets.

    Args:
        layers: their names.
        make: the model with the named layers quantised.
        apart: how far a model's outputs stand from the float one's, over the images that decide.
        few: the same over few images, for the costs.
        allowed: how far they may.

    Returns:
        The model, and the layers left in float, costliest first.

    Raises:
        ExportMismatch: no layer may be quantised.
    """
    model = make(layers)
    found = apart(model)
    if found <= allowed:
        return model, []
    talk.say(f"all {len(layers)} layers in int8 move the outputs too far ({found:.1e} > {allowed:.1e}): weighing each")
    costs = {n: few(make([n])) for n in talk.track(layers, "layers", len(layers))}
    order = sorted(layers, key=costs.__getitem__, reverse=True)
    passing, model = _enough(order, make, apart, allowed)
    failing = passing // 2
    while passing - failing > 1:
        middle = (passing + failing) // 2
        tried = make(order[middle:])
        if apart(tried) <= allowed:
            passing, model = middle, tried
        else:
            failing = middle
    return model, order[:passing]


def _enough(order: Sequence[str], make: Make, apart: Apart, allowed: float) -> tuple[int, "ModelProto"]:
    """The first of 1, 2, 4 … layers that is enough, and the model without them."""
    count = 1
    while count < len(order):
        model = make(order[count:])
        if apart(model) <= allowed:
            return count, model
        count *= 2
    raise ExportMismatch(
        f"int8 moves the outputs too far even with {count // 2} of {len(order)} layers left in float",
        "use --half, or pass a larger --tolerance knowingly",
    )

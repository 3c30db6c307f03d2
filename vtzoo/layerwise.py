"""Learning rates that fall with depth: each layer learns at a share of the one above it.

    share of layer l = decay ** (L - l),   l = 0 for the stem, 1 … L - 1 for the blocks, L for the head

as in ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2021, arXiv:2106.08254, appendix). Which layer a
parameter belongs to timm says by its name; what a method hangs on a layer bears that layer's name, and belongs to it. What
hangs on the network as a whole stands for a parameter of the same name (a class token), or, like prompts that all blocks
share, learns at the full rate.
"""

from typing import Any

from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from vtzoo.graft import named_grafts


def shares(model: nn.Module, decay: float) -> dict[str, float]:
    """The share of the learning rate, in (0, 1], of each parameter below the top, by full name; none with decay 1."""
    if decay == 1:
        return {}
    grouped = getattr(model, "group_matcher", None)
    found: Any = group_parameters(model, grouped(coarse=False), reverse=True) if grouped else auto_group_layers(model)
    layers: dict[str, int] = {**found}
    for place, child in named_grafts(model):
        if place.count(".") == 1:  # on the root
            layers |= {f"{place}{own}": layers[own] for own, _ in child.named_parameters() if own in layers}
    top = max(layers.values())
    return {name: decay ** (top - layer) for name, layer in layers.items() if layer < top}

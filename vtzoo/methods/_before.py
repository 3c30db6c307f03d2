"""Shared by the methods that put a linear adapter before a layer and fold it into that layer."""

from collections.abc import Sequence

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError

FIRST, KEYS = ("qkv", "fc1", "fc1_g", "fc1_x"), ("k", "k_proj", "to_k")


def layers(anatomy: Anatomy, targets: Sequence[str]) -> list[Site]:
    """The layers that the targets name.

    auto is qkv and fc1 of the blocks where they are linear layers, the 1x1 convolutions where there is neither, the blocks' dense convolutions where
    there are none of those but on shortcuts (a ResNet-18).

    Raises:
        UsageError: one of them is grouped.
    """
    found: dict[str, Site] = {}
    for target in targets:
        found |= {s.name: s for s in (_auto(anatomy) if target == "auto" else anatomy.select([target]))}
    for site in found.values():
        if site.facts.get("groups", 1) > 1:
            raise UsageError(
                f"{site.name} is grouped: with an adapter before it, it would fold into a dense kernel",
                "target dense layers",
            )
    return list(found.values())


def shiftable(site: Site) -> bool:
    """Whether a constant added to the layer's input can go into its bias, and counts there.

    Not where it has no bias (a fold may not add tensors), nor before a key, which softmax frees of any shift, nor where a
    convolution is padded (its borders differ) or standardises its weight.
    """
    if site.kind == "linear":
        return site.bias and site.last not in KEYS
    unpadded = set(site.shape[2:]) == {1} and site.facts["padding"] in ([0, 0], 0, "same", "valid")
    return site.bias and unpadded and "standardised" not in site.facts


def _auto(anatomy: Anatomy) -> list[Site]:
    """The layers after each norm of a transformer, or the dense convolutions of a convolutional network."""
    dense = [s for s in anatomy.select(["auto"]) if s.facts.get("groups", 1) == 1]
    first = [s for s in dense if s.kind == "linear" and ("qkv" in anatomy.roles(s) or s.last in FIRST)]
    pointwise = [s for s in dense if "pointwise" in anatomy.roles(s)]
    beside = [s for s in pointwise if "downsample" in anatomy.roles(s) or "shortcut" in s.name]
    return first or (pointwise if len(pointwise) > len(beside) else dense)

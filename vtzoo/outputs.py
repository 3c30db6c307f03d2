"""What a network gives out that a loss may look at: logits, pooled features, maps at several depths, a distillation token's answer.

Duck-typed: of a network `forward_features`, `forward_head` and, for maps, `forward_intermediates` and `feature_info` are used, as timm's
have them.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.errors import Mismatch
from vtzoo.losses._outputs import Outputs, Shapes
from vtzoo.probing import evaluating

LEVELS = 4
"""Of maps at most, evenly spaced, the last depth among them."""
NEAR = 1e-4


def outputs(model: nn.Module, x: Tensor, needs: Collection[str], levels: int = LEVELS) -> Outputs:
    """Run a network once; [batch, 3, h, w] -> what is needed of its outputs.

    Args:
        model: with a classifier where logits are needed.
        x: normalised images.
        needs: "logits", "features", "maps", "token".
        levels: how many maps.
    """
    if not {"features", "maps", "token"} & set(needs):
        return Outputs(logits=model(x))
    body, shown = through(model, x, needs, levels)
    logits, token = answered(model, body) if {"logits", "token"} & set(needs) else (None, None)
    return Outputs(logits, shown.features, shown.maps, token)


def through(model: nn.Module, x: Tensor, needs: Collection[str], levels: int = LEVELS) -> tuple[Tensor, Outputs]:
    """What stands before the classifier, for `answered`, and what is needed of features and maps."""
    found: Any = model
    maps: tuple[Tensor, ...] = ()
    if "maps" in needs:
        body, made = found.forward_intermediates(x, indices=depths(model, levels), output_fmt="NCHW")
        maps = tuple(made)
    else:
        body = found.forward_features(x)
    return body, Outputs(features=found.forward_head(body, pre_logits=True) if "features" in needs else None, maps=maps)


def answered(model: nn.Module, body: Tensor) -> tuple[Tensor, Tensor]:
    """A network's logits, and those of its distillation token; without one, or in evaluation, the same again."""
    found: Any = model.forward_head(body)  # type: ignore[operator] - a method of timm models
    return found if isinstance(found, tuple) else (found, found)


def depths(model: nn.Module, levels: int) -> list[int]:
    """Which of a network's depths are looked at.

    Raises:
        Mismatch: it shows none.
    """
    info: Any = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        raise Mismatch(f"{type(model).__name__} shows no maps", "use a loss on logits or features: vtzoo losses")
    count = len(info)
    taken = min(levels, count)
    return [round((i + 1) * count / taken) - 1 for i in range(taken)]


def levels_of(*models: nn.Module) -> int:
    """How many maps all of them have."""
    return min(len(depths(m, LEVELS)) for m in models)


def shapes(model: nn.Module, size: tuple[int, int, int], needs: Collection[str], levels: int = LEVELS) -> Shapes:
    """Of one image's outputs, the features' width and the maps' channels, height and width."""
    like = next(model.parameters())
    with evaluating(model), torch.no_grad():
        found = outputs(model, torch.zeros(1, *size, device=like.device, dtype=like.dtype), needs, levels)
    width = 0 if found.features is None else found.features.shape[-1]
    maps = [tuple(m.shape[1:]) for m in found.maps]
    return Shapes(width, tuple((c, h, w) for c, h, w in maps))


def check_parts(model: nn.Module, size: tuple[int, int, int], who: str) -> None:
    """See that a network's body and head, run one after the other, give what the network gives.

    Raises:
        Mismatch: they don't: something acts on the whole alone.
    """
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    found: Any = model
    with evaluating(model), torch.no_grad():
        whole, parts = model(x), found.forward_head(found.forward_features(x))
    if whole.shape != parts.shape or (whole - parts).abs().max() > NEAR * whole.abs().max().clamp(min=1):
        raise Mismatch(f"{who} acts on the network as a whole, which shows no features", "use a loss on logits, or fold it first: vtzoo fold")  # fmt: skip

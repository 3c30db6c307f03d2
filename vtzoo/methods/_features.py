"""Shared by the classifiers that work on pooled features: what stands under them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.text_head import TextHead


def sites(anatomy: Anatomy, config: Any) -> Sequence[Site]:  # noqa: ARG001 - the head only
    """None; the backbone must have a classifier to stand on."""
    if not any(isinstance(anatomy.model.get_submodule(n), nn.Linear | TextHead) for n in anatomy.head):
        raise UsageError("this backbone has no linear classifier to replace", "build it with num_classes=N")
    return ()


@torch.no_grad()
def layer(old: nn.Linear | TextHead) -> tuple[Tensor, Tensor]:
    """Copies of a classifier's weight [classes, width] and bias [classes]."""
    weight, bias = old.layer() if isinstance(old, TextHead) else (old.weight, old.bias)
    return weight.detach().clone(), weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()


def hold(module: nn.Module, old: nn.Linear | TextHead) -> None:
    """Give a module a classifier's `weight` and `bias`: to be trained, or, where a text tower makes them, as they are."""
    for name, value in zip(("weight", "bias"), layer(old), strict=True):
        if isinstance(old, TextHead):
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value))

"""A backbone's identity: one sha256 over its tensors' names, shapes and float32 values, head left out."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vtzoo.classifier import head_names
from vtzoo.graft import tensors_of
from vtzoo.tensors import whole

COUNTER = "num_batches_tracked"  # how long a BatchNorm was trained: no part of what it computes, and often not stored


def fingerprint(tensors: Mapping[str, Tensor], head: tuple[str, ...] = ()) -> str:
    """Hash tensors in name order.

    Args:
        tensors: timm-named, before any resizing for another input size.
        head: names of modules to leave out (their tensors start with `<name>.`).

    Returns:
        "sha256:" and 64 hex digits. The same values stored in float16 and loaded as float32 give the same digest.
    """
    digest = hashlib.sha256()
    inside = tuple(h + "." for h in head)
    for name in sorted(n for n in tensors if not n.endswith(COUNTER) and not (inside and n.startswith(inside))):
        value = whole(tensors[name].detach()).to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's own tensors of a live model: no head, no grafts."""
    skip = {id(t) for t in tensors_of(model).values()}  # a module of several names carries its grafts under each
    inside = tuple(h + "." for h in head_names(model))
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if id(v) not in skip}
    return {k: v.detach() for k, v in own.items() if not (inside and k.startswith(inside))}


def fingerprint_of(model: nn.Module) -> str:
    """The fingerprint of a live model's present tensors."""
    return fingerprint(base_state(model))

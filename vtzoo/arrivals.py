"""Weights that come in from elsewhere: whether they are those of their network, and what they say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtzoo.backbone import create
from vtzoo.bases import tensors_of
from vtzoo.classifier import head_names
from vtzoo.clip_config import ARCH
from vtzoo.errors import Corrupt, NotFound, ShapeMismatch
from vtzoo.fingerprint import COUNTER, base_state, fingerprint
from vtzoo.spec import BackboneCard
from vtzoo.tensors import TensorFile, dtype_of, shape_of


def looked_at(card: BackboneCard, weights: Path) -> BackboneCard:
    """The card with what its weights say: fingerprint, head, parameters, features.

    Raises:
        ShapeMismatch: they are not those of its architecture.
        Corrupt: a tensor of a type that isn't read here, or with NaN or infinity in it.
    """
    readable(weights)
    source = tensors_of(weights, card)
    model: Any = create(card.arch, pretrained=False, num_classes=1, **card.model_args)
    inside = tuple(f"{h}." for h in head_names(model))
    base = {n: source[n] for n in source if not n.startswith(inside)}
    check_fit(base, base_state(model), card.arch)
    params = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(inside))
    head = tuple(n for n in source if n.startswith(inside))
    features = int(model.embed_dim if card.arch == ARCH else getattr(model, "num_features", 0))
    return replace(card, fingerprint=fingerprint(base), head=head, params=params, features=features)


def readable(path: Path) -> TensorFile:
    """A file of tensors.

    Raises:
        NotFound: there is none.
        Corrupt: it is no safetensors file, or holds a type of tensors that isn't read here.
    """
    if not path.is_file():
        raise NotFound(f"no file {path}", "give a .safetensors file")
    source = TensorFile(path)
    for name in source:
        source.dtype(name)  # refuses what isn't read here
    return source


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Any], arch: str) -> None:
    """Refuse tensors that are not a network's.

    Args:
        found: by name; each is read.
        wanted: the network's own.
        arch: what it is called.

    Raises:
        ShapeMismatch: tensors are missing, left over, or of another shape or kind.
        Corrupt: one holds NaN or infinity.
    """
    wanted = {n: t for n, t in wanted.items() if not n.endswith(COUNTER)}
    found = {n: found[n] for n in found if not n.endswith(COUNTER)}
    lacking, spare = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if lacking or spare:
        raise ShapeMismatch(
            f"the file is not a complete {arch}: it lacks {_few(lacking)} and has {_few(spare)} of its own",
            "give timm-named weights of this architecture",
        )
    for name, value in wanted.items():
        if shape_of(found, name) != tuple(value.shape):
            raise ShapeMismatch(
                f"{name} is {list(shape_of(found, name))} in the file, {list(value.shape)} in {arch}",
                "is --input-size or --arch another?",
            )
        if dtype_of(found, name).is_floating_point != value.dtype.is_floating_point:
            raise ShapeMismatch(f"{name} is {dtype_of(found, name)} in the file, {value.dtype} in {arch}", "store it as F32")  # fmt: skip
        if not bool(torch.isfinite(found[name]).all()):
            raise Corrupt(f"{name} holds NaN or infinity in the file", "fetch or make the file again")


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:2])})" if names else "no tensor"

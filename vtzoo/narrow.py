"""Frozen weights kept once, in the type that is computed in, while a network is trained in bf16 or fp16.

Under autocast a linear or a convolution casts its float32 weight in every pass, and keeps the copy until the backward pass.
Where nothing but its own forward reads a frozen weight, the cast is made once here: the same numbers, bit for bit, from half
the memory. What the cast rounds away waits on the disk, in a file without a name, and comes back as it was.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import machine
from vtzoo.anatomy import survey
from vtzoo.graft import named_bare, nature, own_parameters
from vtzoo.probing import probe
from vtzoo.tensors import TensorFile, write

OWN = (nn.Linear.forward, nn.Conv2d.forward)


def narrow(
    model: nn.Module, dtype: torch.dtype, precision: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], None]:
    """Cast the frozen weights that autocast would cast; nothing happens where that is not the same, or the disk has no room.

    Args:
        model: grafted, on its device; in float32.
        dtype: that of the autocast.
        precision: the autocast.

    Returns:
        What gives the weights back, bit for bit.
    """
    weights = _weights(model)
    wide = {n: w.detach() for n, w in weights.items()}
    if not wide or machine.free_bytes(Path(tempfile.gettempdir())) < 2 * sum(w.nbytes for w in wide.values()):
        return lambda: None
    with precision():
        before = probe(model)
    for weight in weights.values():
        weight.data = weight.data.to(dtype)
    with precision():
        same = torch.equal(probe(model), before)
    if not same:
        _widen(weights, wide.__getitem__)
        return lambda: None
    with tempfile.TemporaryDirectory(prefix="vtzoo-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "wide.safetensors"
        write(path, wide, {})
        stored = TensorFile(path)  # it stays open, so that its name can go
    return partial(_widen, weights, stored.__getitem__)


def _widen(weights: dict[str, nn.Parameter], wide: Callable[[str], Tensor]) -> None:
    for name, weight in weights.items():
        weight.data = torch.empty_like(weight, dtype=torch.float32).copy_(wide(name))


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of linears and convolutions that are called, run by their own forward, and are frozen in float32; those that no other module has."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    called, found = survey(model).seen, dict[str, nn.Parameter]()
    for name, module in named_bare(model):
        (base, reads), weight = nature(module), own_parameters(module).get("weight")
        if name not in called or base.forward not in OWN or "weight" in reads or not isinstance(weight, nn.Parameter):
            continue
        if not weight.requires_grad and weight.dtype == torch.float32 and owners[id(weight)] == 1:
            found[f"{name}.weight"] = weight
    return found

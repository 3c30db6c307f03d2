"""Devices, precisions and processes, as accelerate finds them."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtzoo.attention import PlainAttention
from vtzoo.errors import UsageError
from vtzoo.machine import processes
from vtzoo.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(days=1)
"""How long processes wait for each other: one may compute features or weigh methods for hours. A dead one is noticed at once."""


def accelerator(recipe: Recipe) -> "Accelerator":
    """The device and precision that a recipe asks for; where torchrun or accelerate started several processes, they meet here.

    Raises:
        UsageError: this machine doesn't have them, or one process is to share a network with itself.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    together = processes() > 1
    # a process may train several times, each in its own precision; accelerate has no public way to say so
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - see above
    try:
        made = Accelerator(
            mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
            cpu=recipe.device == "cpu"
            or (together and recipe.device == "auto" and not torch.accelerator.is_available()),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise UsageError(f"{recipe.precision} can't be used here ({error})", "use --precision fp32") from error
    found = made.device.type
    if recipe.device not in ("auto", found):
        raise UsageError(f"device '{recipe.device}' is not available, '{found}' is", f"use --set device={found}")
    if recipe.precision == "fp16" and found == "cpu":
        raise UsageError("fp16 needs a GPU, and this training runs on the CPU", "use --precision bf16 or fp32")
    if together and made.num_processes == 1:
        raise UsageError(f"processes can't train together on '{found}'", "start one, or use --set device=cpu")
    if recipe.parallel == "fsdp":
        _check_sharing(recipe, made.num_processes)
    return made


def _check_sharing(recipe: Recipe, processes: int) -> None:
    """Refuse what a network of which each process keeps a part can't do.

    Raises:
        UsageError: there is one process, or compiled blocks or an average of the whole network are asked for.
    """
    if processes == 1:
        raise UsageError(
            "parallel=fsdp shares the network out among processes, and this is one",
            "torchrun --nproc-per-node 2 -m vtzoo_cli train …",
        )
    if recipe.compile:
        raise UsageError("compiled blocks can't be shared out among processes", "leave compile or parallel out")
    if recipe.ema_decay:
        raise UsageError(
            "ema_decay averages the whole network, which no process has", "leave ema_decay or parallel out"
        )


def emulates(made: "Accelerator") -> bool:
    """Whether it is bf16 on a processor without the instructions that make it fast: it is right then, and many times slower than fp32."""
    found = made.device.type == "cpu" and made.mixed_precision == "bf16" and torch.backends.mkldnn.is_available()
    return found and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - torch has no public way to say so


@contextmanager
def computing(made: "Accelerator") -> Generator[None]:
    """The precision that an accelerator stands for, with attention that is fast in it."""
    reduced = made.device.type == "cpu" and made.mixed_precision == "bf16"
    with made.autocast(), PlainAttention() if reduced else nullcontext():
        yield


def channels_last(model: nn.Module) -> nn.Module:
    """Lay every tensor of four dimensions out channels last; `Module.to` would ask it of those of five, too, which can't."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.ndim == 4:
            value.data = value.data.to(memory_format=torch.channels_last)
    return model

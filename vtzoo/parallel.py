"""Several processes that train one delta: who takes which images, and the little that they tell each other.

    g = sum_r n_r g_r / sum_r n_r        process r has the mean gradient g_r of its n_r images of a batch

So a step in many processes is the step of one, but for rounding: one sum over the gradients of the delta and the head, laid
flat, after each backward pass. The frozen network is the same everywhere and needs none; with `sharded`, each process keeps a part of it.
In one process nothing here does anything.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vtzoo.anatomy import survey
from vtzoo.errors import Mismatch, UsageError, VtzooError
from vtzoo.graft import grafts
from vtzoo.speech import SCALES, TEXT

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, is the one that writes and speaks."""
    return dist.get_rank() if count() > 1 else 0


def own(places: Sequence[int], *, paired: bool = False) -> list[int]:
    """This process's part of a batch; see `part`."""
    return part(places, rank(), count(), paired=paired)


def part(places: Sequence[int], which: int, among: int, *, paired: bool = False) -> list[int]:
    """One process's part of a batch, in the batch's order; all of it where there are too few for each to have some.

    Args:
        places: the batch.
        which: process.
        among: so many.
        paired: the first stays with the last, the second with the last but one, …: mixing pairs them so.
    """
    last = len(places) - 1
    units = last // 2 + 1 if paired else len(places)
    if units < among:
        return list(places)
    return [p for i, p in enumerate(places) if (min(i, last - i) if paired else i) % among == which]


def turns(images: int) -> list[int]:
    """The places of the images that this process looks at when all are to be measured; the last one again where there are too few."""
    return [min(i, images - 1) for i in range(rank(), -(-images // count()) * count(), count())]


def gathered(rows: Tensor, images: int) -> Tensor:
    """What processes found for the images of their `turns`, [own, …], in the order of all, [images, …]."""
    if count() == 1:
        return rows
    own = rows.to(_device()).contiguous()
    found = [torch.empty_like(own) for _ in range(count())]
    with _together():
        dist.all_gather(found, own)
    return torch.stack(found, 1).flatten(0, 1)[:images].to(rows.device)


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter], loss: Tensor, images: int) -> Tensor:
    """Make every gradient the mean over the images of all processes; gives the loss's. A gradient that nobody has stays absent.

    Args:
        parameters: the same in all processes.
        loss: the mean over this process's images.
        images: how many these are.
    """
    if count() == 1:
        return loss
    own = [p for p in parameters if p.requires_grad]
    there = loss.new_tensor([p.grad is not None for p in own])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    *values, had, found = mean([*grads, there, loss], images)
    for p, value, any_has in zip(own, values, had.tolist(), strict=True):
        p.grad = value if any_has else None
    return found


@torch.no_grad()
def mean(values: Sequence[Tensor], images: int) -> list[Tensor]:
    """What tensors are over the images of all processes, given their means over this one's.

    Args:
        values: of the same shapes in all processes.
        images: how many this one has.
    """
    if count() == 1:
        return list(values)
    flat = torch.cat([*[v.flatten() for v in values], values[-1].new_ones(1)]) * images
    _sum(flat)
    parts = (flat[:-1] / flat[-1]).split([v.numel() for v in values])
    return [p.view_as(v).to(v.dtype, copy=True) for p, v in zip(parts, values, strict=True)]


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    if count() == 1:
        return flag
    value = torch.tensor([float(flag)], device=_device())
    _sum(value)
    return bool(value > 0)


def by_first(do: Callable[[], T]) -> T:
    """What the first process makes, given to all; its refusal, too.

    Raises:
        VtzooError: whatever refusal the first one met.
    """
    if count() == 1:
        return do()
    sent: list[Any] = [None, None]
    if rank() == 0:
        try:
            sent[0] = do()
        except VtzooError as error:
            sent[1] = error
    with _together():
        dist.broadcast_object_list(sent, device=_device())
    if sent[1] is not None:
        raise sent[1]
    return sent[0]


def agree(what: str) -> None:
    """Refuse processes that were started with different commands or data.

    Raises:
        Mismatch: this one has something else than the first.
    """
    same = by_first(lambda: what) == what
    if anywhere(not same):
        raise Mismatch("the processes differ in command, data or versions", "start the same command everywhere")


@torch.no_grad()
def spread(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of the first."""
    if count() == 1:
        return
    for value in tensors:
        whole = value.detach().contiguous()
        with _together():
            dist.broadcast(whole, 0)
        value.copy_(whole)


def sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Leave each process a part of every frozen parameter (FSDP2); blocks are gathered while they run. What is trained stays whole, and so does a text tower.

    Args:
        model: grafted; nothing may be grafted or taken off afterwards.
        device: of the process.

    Raises:
        UsageError: this torch can't leave parameters out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return model
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    beside = (TEXT, *SCALES)  # a text tower is asked outside of a pass over images, too
    whole = {p for n, p in model.named_parameters() if p.requires_grad or owners[id(p)] > 1 or n.startswith(beside)}
    for p in whole:
        p.data = p.data.to(device)
    if "ignored_params" not in signature(fully_shard).parameters:
        raise UsageError(f"torch {torch.__version__} can't shard a part of a network", "use a newer torch")
    how: dict[str, Any] = {"mesh": init_device_mesh(device.type, (count(),)), "ignored_params": whole}
    for block in survey(model).blocks:
        module = model.get_submodule(block.name)
        if any(g.aside for m in module.modules() for g in grafts(m)):
            continue  # gradients come into it beside its output, before it would be gathered again: it stays with the root, gathered all the while
        module.register_forward_hook(_own_tensor)
        fully_shard(module, **how)
    fully_shard(model, **how)
    return model


def _own_tensor(_module: nn.Module, _args: Any, y: Any) -> Any:
    """No view: what changes one in place afterwards would take off the hook that gathers the block again in the backward pass."""
    return y.clone() if isinstance(y, Tensor) and y._is_view() else y  # noqa: SLF001 - torch's only way to ask


def _device() -> torch.device:
    """Where tensors must lie to be sent: the graphics card where processes talk through it."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _sum(value: Tensor) -> None:
    with _together():
        dist.all_reduce(value)


@contextmanager
def _together() -> Generator[None]:
    """Say plainly that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "onnection" not in str(error):
            raise
        raise VtzooError(
            "another process of this training has stopped", "its own error says why; then go on with --resume"
        ) from error

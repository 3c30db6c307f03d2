"""How the blocks of a network run while it is trained: computed again in the backward pass, or compiled.

Of a block that is computed again only its input is kept, until the backward pass comes to it (Chen et al. 2016,
arXiv:1604.06174); random numbers are those of the first time, norms count a batch once, and the gradients are the same, bit
for bit. A block that is compiled runs as code made for its shapes; blocks of one kind share it. What they need of a block,
its own forward, is exchanged for the length of a step, and nothing else.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vtzoo.anatomy import survey
from vtzoo.errors import UsageError, VtzooError
from vtzoo.graft import has_statistics

Run = Callable[..., Any]
Context = Callable[[], AbstractContextManager[Any]]
KINDS = 64
"""How many kinds of blocks are compiled, each for itself, before the rest runs as it is written."""


def manner(model: nn.Module, precision: Context, *, again: bool = False, compiled: str = "") -> Context:
    """How the blocks of a model run in a step, forward and backward, as a context to be entered for each.

    Args:
        model: grafted; nothing may be grafted or taken off afterwards.
        precision: the context in which it runs, for what is computed again.
        again: keep no activations inside of blocks.
        compiled: name of the backend of `torch.compile` that makes code of them, if any.

    Raises:
        UsageError: the model has no blocks.
    """
    if not again and not compiled:
        return nullcontext
    blocks = [model.get_submodule(site.name) for site in survey(model).blocks]
    if not blocks:
        raise UsageError(
            f"this {type(model).__name__} has no numbered blocks to compute again or to compile",
            "leave checkpointing and compile out",
        )
    runs: list[tuple[nn.Module, Run]] = []
    for block in blocks:
        run = torch.compile(block.forward, dynamic=False, backend=compiled) if compiled else block.forward
        run = partial(_again, block, run, precision) if again else run
        runs.append((block, partial(_whole, block, _inside(block), block.forward, run)))
    return lambda: _running(runs)


@contextmanager
def _running(runs: Sequence[tuple[nn.Module, Run]]) -> Generator[None]:
    """Exchange the forwards of blocks.

    Raises:
        VtzooError: one can't be compiled here.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    try:
        for block, run in runs:
            block.__dict__["forward"] = run
        with config.patch(recompile_limit=KINDS):
            yield
    except TorchDynamoException as error:
        raise VtzooError(
            f"torch.compile fails here ({' '.join(str(error).splitlines()[:2])})", "leave compile out"
        ) from error
    finally:
        for block, _ in runs:
            block.__dict__.pop("forward", None)


def _inside(block: nn.Module) -> int:
    """How many of its modules run by a forward that was given to them alone."""
    return sum("forward" in m.__dict__ for m in block.modules())


def _whole(block: nn.Module, inside: int, plain: Run, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Run a block one way, or plainly where a part of it gives what was computed before (see `vtzoo.prefix`), for this pass alone."""
    return (run if _inside(block) == inside + 1 else plain)(*args, **kwargs)


def _again(block: nn.Module, run: Run, precision: Context, *args: Any, **kwargs: Any) -> Any:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _second(block, precision)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _second(block: nn.Module, precision: Context) -> Generator[None]:
    """What holds when a block is computed again: the precision of the first time, and statistics that stay."""
    moving = [m for m in block.modules() if m.training and has_statistics(m)]
    kept = [(b, b.clone()) for m in moving for b in m.buffers(recurse=False)]
    with ExitStack() as stack:
        stack.enter_context(precision())
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)

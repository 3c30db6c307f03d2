"""Shared by the methods that act inside attentions: which of a backbone's attentions and blocks `_attend` can write anew.

One probe keeps what they were given and gave; where the numbers differ, the method is refused, naming the layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._attend import attend, finished
from vtzoo.methods._bottleneck import ATTENTION
from vtzoo.probing import probe


def attentions(anatomy: Anatomy, wanted: str) -> list[tuple[Site, str]]:
    """The attention of every block that has one, with the name of the norm before it ("" where it follows).

    Args:
        anatomy: of the bare model.
        wanted: what doesn't fit otherwise, for the refusal.

    Raises:
        UsageError: there is none, or some attention is not the function that is written here.
    """
    inside = {b.name: anatomy.within(b.name, *ATTENTION) for b in anatomy.blocks}
    blocks = {b: n for b, n in inside.items() if n is not None and _looks_like_one(anatomy.modules[n])}
    if not blocks:
        raise UsageError(
            f"no block of this {type(anatomy.model).__name__} has a plain attention as its own part, so {wanted} don't fit",
            "use lora, ssf or adapter instead",
        )
    calls = watch(anatomy, [*blocks.values(), *(f"{b}.norm1" for b in blocks if f"{b}.norm1" in anatomy.seen)])
    for name in blocks.values():
        if not same(lambda c, name=name: attend(anatomy.modules[name], *c.args, **c.kwargs), calls[name]):
            raise UsageError(
                f"the {type(anatomy.modules[name]).__name__} of {type(anatomy.model).__name__} is not a plain softmax attention, "
                f"so {wanted} don't fit",
                "use lora, ssf or adapter instead",
            )
    found: list[tuple[Site, str]] = []
    for block, name in blocks.items():
        norm = calls.get(f"{block}.norm1")
        before = norm is not None and norm.order < calls[name].order
        host: Any = anatomy.modules[name]
        about = {"heads": host.num_heads, "head_width": host.proj.in_features // host.num_heads}
        found.append((anatomy.module(name, **about), f"{block}.norm1" if before else ""))
    return found


def plain_blocks(anatomy: Anatomy, wanted: str) -> list[Site]:
    """The blocks that are a plain attention over one sequence and an MLP, each behind a norm and added to its input.

    Raises:
        UsageError: there are none, or some are not.
    """
    attentions(anatomy, wanted)
    names = [b.name for b in anatomy.blocks]
    parts = [f"{n}.{part}" for n in names for part in ("norm1", "attn")]
    calls = watch(anatomy, [n for n in (*names, *parts) if n in anatomy.seen])
    for name in names:
        if not _is_plain(anatomy.modules[name], *(calls.get(n) for n in (name, f"{name}.norm1", f"{name}.attn"))):
            raise UsageError(
                f"the {type(anatomy.modules[name]).__name__} of {type(anatomy.model).__name__} is not an attention over one sequence "
                f"and an MLP, each behind its norm, so {wanted} don't fit",
                "use vpt-deep, lora or adapter instead",
            )
    return [anatomy.module(n) for n in names]


def _is_plain(block: nn.Module, whole: "Call | None", norm: "Call | None", attn: "Call | None") -> bool:
    """Whether the attention is given what the norm gave, and `finished` is the rest of the block."""
    if (
        whole is None
        or norm is None
        or attn is None
        or not attn.args
        or attn.args[0] is not norm.y
        or whole.y.ndim != 3
    ):
        return False
    return same(lambda c: finished(block, c.args[0], attn.y), whole)


def _looks_like_one(module: nn.Module) -> bool:
    """Has projections to queries and back (pooling and squeeze-and-excite go by the same names)."""
    children = {n for n, _ in module.named_children()}
    return "proj" in children and bool(children & {"qkv", "q_proj", "kv"})


class Call:
    """What a module was given and gave, and when."""

    def __init__(self, order: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> None:
        self.order, self.args, self.kwargs, self.y = order, args, kwargs, y


def watch(anatomy: Anatomy, names: Sequence[str]) -> dict[str, Call]:
    """Run a random image and keep what these modules saw."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            calls[name] = Call(len(calls), args, kwargs, y)

        return hook

    handles = [anatomy.modules[n].register_forward_hook(note(n), with_kwargs=True) for n in names]
    try:
        probe(anatomy.model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def same(function: Callable[[Call], Tensor], call: Call) -> bool:
    """Whether a function of a call gives what the module gave."""
    try:
        found = function(call)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # it lacks a part, or wants another shape
        return False
    largest = float(call.y.abs().max())
    return found.shape == call.y.shape and torch.allclose(found, call.y, rtol=1e-3, atol=1e-4 * largest)

"""Which parameters of a block, at zero, make it add nothing, so that its output is its input bit for bit.

Not reasoned about but tried, on random weights: from the last parameter backwards each is put to zero where that moves the output, until
output and input are the same; then those that it goes without are given back. A residual block keeps its last scale (LayerScale, a
BatchNorm's weight) or its last projections.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vtzoo.probing import evaluating, input_size

Call = tuple[tuple[Any, ...], dict[str, Any]]
Zeros = dict[str, Tensor]


@torch.no_grad()
def silent(model: nn.Module, blocks: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The full names of such parameters, by block; a block that can't be silenced is missing.

    Args:
        model: of any weights, which it keeps.
        blocks: names of modules that are called once with what they add to.
    """
    found: dict[str, tuple[str, ...]] = {}
    with torch.random.fork_rng(devices=[]), evaluating(model):
        torch.manual_seed(0)
        tensors = _random(model)
        for name, call in _calls(model, tensors, blocks).items():
            inside = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
            zeros = _zeros(model.get_submodule(name), inside, call)
            if zeros is not None:
                found[name] = tuple(f"{name}.{n}" for n in zeros)
    return found


def _random(model: nn.Module) -> dict[str, Tensor]:
    """Values of a healthy size for every parameter: a fresh network has branches at zero, which would seem silent whatever is in them."""
    found: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, dtype=torch.float64).to(value)
        found[name] = noise * (value.shape[0] / value.numel()) ** 0.5 if value.ndim > 1 else 1 + 0.3 * noise
    return found


def _calls(model: nn.Module, tensors: Mapping[str, Tensor], blocks: Iterable[str]) -> dict[str, Call]:
    """What each block is given."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in blocks]
    like = next(iter(tensors.values()))
    try:
        functional_call(model, dict(tensors), (torch.randn(1, *input_size(model, most=None)).to(like),))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _zeros(block: nn.Module, tensors: Mapping[str, Tensor], call: Call) -> Sequence[str] | None:
    (x, *_), _ = call
    zeros: Zeros = {}
    order = _order(block, tensors, call)
    out = _run(block, tensors, zeros, call)
    for name in reversed(order):
        if _same(out, x):
            break
        tried = _run(block, tensors, {**zeros, name: torch.zeros_like(tensors[name])}, call)
        if not _same(tried, out):
            zeros[name], out = torch.zeros_like(tensors[name]), tried
    if not _same(out, x):
        return None
    for name in list(zeros):
        fewer = {n: z for n, z in zeros.items() if n != name}
        if _same(_run(block, tensors, fewer, call), x):
            zeros = fewer
    return tuple(zeros)


def _order(block: nn.Module, tensors: Mapping[str, Tensor], call: Call) -> list[str]:
    """A block's parameters in the order in which the modules that own them are done."""
    done: list[str] = []
    hooks = [
        m.register_forward_hook(lambda *_, n=n: done.append(n))  # type: ignore[misc] - a hook that changes nothing
        for n, m in block.named_modules()
    ]
    try:
        _run(block, tensors, {}, call)
    finally:
        for hook in hooks:
            hook.remove()
    owned = [(n.rpartition(".")[0], n) for n in tensors]
    return [n for module in done for owner, n in owned if owner == module]


def _run(block: nn.Module, tensors: Mapping[str, Tensor], zeros: Zeros, call: Call) -> Any:
    args, kwargs = call
    return functional_call(block, {**tensors, **zeros}, args, kwargs)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)

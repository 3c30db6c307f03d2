"""The frozen prefix: what a network computes before the first module that training changes, so that it need be computed once.

    model(x) = rest(features(x))

The network is cut at the input of one module. Which modules run before the first trained one, a forward pass shows; names
mean nothing. For `rest`, those before the cut give zeros of their own shape, the module at the cut gets the stored
features, and all else runs as it is written. Whether the network really passes through the cut (a skip connection may go
around it) is not reasoned about but tried: `rest(features(x))` must be `model(x)`, bit for bit, or the cut is moved up.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.graft import grafts, has_statistics, hosts
from vtzoo.probing import evaluating, input_size

TRIES = 8
"""How many cuts are tried."""


class _Reached(Exception):
    """Carries the features out of a forward pass that needn't go on."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True)
class Prefix:
    """Where a network is cut.

    Attributes:
        cut: the module that gets the features.
        shape: of one image's features.
        stubs: the modules before it, with the shape that each gives for one image.
        last: the module at the cut gives what the network gives, so that it alone is the rest.
        size: of the network's input, [channels, height, width].
    """

    cut: str
    shape: tuple[int, ...]
    stubs: Mapping[str, tuple[int, ...]]
    last: bool
    size: tuple[int, ...]

    @property
    def spared(self) -> tuple[str, ...]:
        """The modules that need not run for the rest."""
        return tuple(self.stubs)

    @property
    def facts(self) -> dict[str, Any]:
        """What the features depend on beside the network; their shape tells what the classifier is given, of a cut right before it."""
        return {"cut": self.cut, "size": self.size, "shape": self.shape}

    @property
    def told(self) -> str:
        """What runs once, in words."""
        return f"all before {self.cut}"

    @torch.no_grad()
    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What comes to the cut, [images, ...], for x [images, channels, height, width]."""

        def reached(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        hook = model.get_submodule(self.cut).register_forward_pre_hook(reached)
        try:
            model(x)
        except _Reached as found:
            return found.value
        finally:
            hook.remove()
        raise RuntimeError(f"{self.cut} is not called any more")

    def rest(self, model: nn.Module, features: Tensor) -> Tensor:
        """What the network makes of features, as `model(x)` does."""
        if self.last:
            return model.get_submodule(self.cut)(features)
        with self._short(model, features):
            return model(features.new_zeros(()).expand(len(features), *self.size))

    @contextmanager
    def _short(self, model: nn.Module, features: Tensor) -> Generator[None]:
        """The network without what lies before the cut."""
        zeros = {s: features.new_zeros((len(features), *s)) for s in set(self.stubs.values())}
        changed: list[nn.Module] = []
        try:
            for name, shape in self.stubs.items():
                changed.append(model.get_submodule(name))
                changed[-1].__dict__["forward"] = partial(_given, zeros[shape])
            first = model.get_submodule(self.cut)
            run = first.forward
            first.__dict__["forward"] = lambda _, *args, **kwargs: run(features, *args, **kwargs)
            changed.append(first)
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)


def _given(value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return value


@dataclass(eq=False)
class _Call:
    """One call of a module in a forward pass; `start` and `end` number all beginnings and ends."""

    name: str
    start: int
    inside: "_Call | None"
    value: Any
    end: int = 0
    out: Any = None


@torch.no_grad()
def find(model: nn.Module, size: Sequence[int] | None = None, least: float = 0.0) -> Prefix | None:
    """The last cut before everything that training changes; None where there is none.

    Args:
        model: as it will be trained; what requires gradients changes, grafts, and running statistics that aren't frozen.
        size: of its input, [channels, height, width].
        least: give up, after one forward pass, where less than this share of the network's numbers lies before that.
    """
    like, size = next(model.parameters()), tuple(size or input_size(model, most=None))
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(n, *size, generator=draw).to(like.device, like.dtype) for n in (2, 2, 3)]
    with torch.random.fork_rng(devices=[]), evaluating(model):
        seen = watched(model, images[0])
        firsts = [_first(seen, n) for n in _changing(model)]
        first = min(firsts, key=lambda c: c.start, default=seen[0])
        if _part(model, {c.name for c in seen if c.end < first.start}) < least:
            return None
        others, wanted = watched(model, images[1]), model(images[2])
        for cut in _cuts(seen, others, first):
            zeros, shape = stubs(seen, others, cut), tuple(cut.value.shape[1:])
            found = Prefix(cut.name, shape, zeros, cut.out is seen[0].out, size)
            if _equal(found, model, images[2], wanted):
                return found
    return None


def share(model: nn.Module, prefix: Prefix) -> float:
    """Which part of the network's numbers lies before the cut, from 0 to 1: about the time that is saved."""
    return _part(model, prefix.spared)


def _part(model: nn.Module, names: Iterable[str]) -> float:
    """The share of a network's numbers that some of its modules own and nobody trains, each counted once; what is looked up does no work."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    own = {p for n in names for p in model.get_submodule(n).parameters() if not p.requires_grad} - tables
    return sum(p.numel() for p in own) / max(1, sum(p.numel() for p in {*model.parameters()} - tables))


def _changing(model: nn.Module) -> set[str]:
    """The modules that training changes."""
    owners = {n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    grafted = {n for n, host in hosts(model) if any(g.calls or g.edits for g in grafts(host))}
    moving = {n for n, m in model.named_modules() if has_statistics(m) and not m.__dict__.get("_frozen_statistics")}
    return owners | grafted | moving


def watched(model: nn.Module, x: Tensor) -> list[_Call]:
    """Every call of a forward pass, in order of beginning; the first is the model's own."""
    calls, stack, names = list[_Call](), list[_Call](), {m: n for n, m in model.named_modules()}
    ticks = count()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(_Call(names[module], next(ticks), stack[-1] if stack else None, args[0] if args else None))
        stack.append(calls[-1])

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        call = stack.pop()
        call.end, call.out = next(ticks), out

    hooks = [h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first(calls: Sequence[_Call], name: str) -> _Call:
    """Where a module is first at work; one that is read and never called is so within what is called around it."""
    found = {c.name: c for c in reversed(calls)}
    while name not in found:
        name = name.rpartition(".")[0]
    return found[name]


def _cuts(seen: Sequence[_Call], others: Sequence[_Call], first: _Call) -> list[_Call]:
    """Where the network might be cut, the best place first: what the first change happens in, then what ran before beside those."""
    chain = list[_Call]()
    inner: _Call | None = first
    while inner is not None:
        chain.append(inner)
        inner = inner.inside
    before = [c for c in reversed(seen) if c.start < first.start and c.inside in chain and c not in chain]
    other = dict(zip(seen, others, strict=True))
    cuts = [c for c in (*chain, *before) if c.inside and _once(seen, c.name) and _depends(c.value, other[c].value)]
    return list(dict.fromkeys(map(_outermost, cuts)))[:TRIES]


def _outermost(call: _Call) -> _Call:
    """The first that gets the very tensor, but for the model itself: one name for one place."""
    while call.inside and call.inside.inside and call.inside.value is call.value:
        call = call.inside
    return call


def stubs(seen: Sequence[_Call], others: Sequence[_Call], cut: _Call) -> dict[str, tuple[int, ...]]:
    """The modules that need not run for the rest: outermost, over before the cut, and giving something for each image."""
    found: dict[str, tuple[int, ...]] = {}
    for call, other in zip(seen, others, strict=True):
        outermost = call.inside is None or call.inside.end > cut.start
        if call.end < cut.start and outermost and _once(seen, call.name) and _depends(call.out, other.out):
            found[call.name] = tuple(call.out.shape[1:])
    return found


def _once(calls: Sequence[_Call], name: str) -> bool:
    return sum(c.name == name for c in calls) == 1


def _depends(value: Any, other: Any) -> bool:
    """Whether something is one tensor for each of two images, and another for others."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.shape != other.shape:
        return False
    return value.is_floating_point() and value.ndim > 1 and len(value) == 2 and not torch.equal(value, other)


def _equal(prefix: Prefix, model: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    """Whether the cut gives what the network gives, and the prefix is the same in training."""
    try:
        features = prefix.features(model, x)
        same = torch.equal(prefix.rest(model, features.clone()), wanted)
        return same and torch.equal(prefix.features(model.train(), x), features)
    except (RuntimeError, TypeError, ValueError):  # what a network does with zeros that it didn't expect
        return False
    finally:
        model.eval()

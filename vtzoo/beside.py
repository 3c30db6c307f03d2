"""What stands beside a frozen network and gives nothing back to it: all that it leans on is computed once.

    model(x) = rest(features(x)),    features(x) = [what the first module leaned on is given, what each of them gives of its own]

A ladder (LST) reads every block and changes none. For `rest` the blocks that it leans on give what was kept, what lies before them
gives zeros, and all else runs as it is written. That nothing is given back is tried, not read off names: with the trained
numbers moved, every kept value must be what it was, and `rest(features(x))` must be `model(x)`, bit for bit.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.graft import grafts, hosts, owning
from vtzoo.prefix import Prefix, share, stubs, watched
from vtzoo.probing import evaluating, input_size

Run = Callable[..., Any]
MOVE = 0.1
"""How far trained numbers are moved to see what they reach."""


@dataclass(frozen=True)
class Beside(Prefix):
    """Where a network is leaned on; `cut` is the first of these modules.

    Attributes:
        hosts: the modules, in the order in which they run.
        shapes: for one image, of what the first is given, then of what each gives.
    """

    hosts: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def spared(self) -> tuple[str, ...]:
        """The modules that need not run for the rest."""
        return (*self.stubs, *self.hosts)

    @property
    def facts(self) -> dict[str, Any]:
        """What the features depend on beside the network."""
        return {**super().facts, "hosts": self.hosts}

    @property
    def told(self) -> str:
        """What runs once, in words."""
        return f"what {len(self.hosts)} modules from {self.cut} on make of an image"

    @torch.no_grad()
    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is leaned on, [images, numbers], for x [images, channels, height, width]."""
        return torch.cat([v.flatten(1) for v in _own(model, self.hosts, x).values()], 1)

    def rest(self, model: nn.Module, features: Tensor) -> Tensor:
        """What the network makes of features, as `model(x)` does."""
        parts = [
            _laid_out(p.unflatten(1, s))
            for p, s in zip(features.split([math.prod(s) for s in self.shapes], 1), self.shapes, strict=True)
        ]
        own = {n: partial(_kept, p) for n, p in zip(self.hosts, parts[1:], strict=True)}
        with self._short(model, parts[0]), _owning(model, own):
            return model(features.new_zeros(()).expand(len(features), *self.size))


def _laid_out(value: Tensor) -> Tensor:
    """Numbers as a layer lays them out, since products of a slice's may round otherwise: maps channels last, as convolutions are trained."""
    return value.contiguous(memory_format=torch.channels_last if value.ndim == 4 else torch.contiguous_format)


def _own(model: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What the first of some hosts is given, under "", and what each gives of its own, before its grafts, in the order of names."""
    found: dict[str, Any] = {"": None, **dict.fromkeys(names)}

    def given(_: nn.Module, args: tuple[Any, ...]) -> None:
        found[""] = args[0].clone()

    def keep(name: str, run: Run, *args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        found[name] = out.clone() if isinstance(out, Tensor) else out  # what comes after may change it in place
        return out

    hook = model.get_submodule(names[0]).register_forward_pre_hook(given)
    try:
        with _owning(model, {n: partial(keep, n) for n in names}):
            model(x)
    finally:
        hook.remove()
    return found


def _kept(value: Tensor, _run: Run, *_args: Any, **_kwargs: Any) -> Tensor:
    return value


@contextmanager
def _owning(model: nn.Module, own: Mapping[str, Run]) -> Generator[None]:
    with ExitStack() as stack:
        for name, run in own.items():
            stack.enter_context(owning(model.get_submodule(name), run))
        yield


@torch.no_grad()
def find(model: nn.Module, size: Sequence[int] | None = None, least: float = 0.0) -> Beside | None:
    """What stands still beside all that is trained; None where that is nothing, or less than `least` of the network's numbers.

    Args:
        model: as it will be trained.
        size: of its input, [channels, height, width].
        least: share of the numbers that must be spared, from 0 to 1.
    """
    carrying = {
        name: grafts(host) for name, host in hosts(model) if name
    }  # what hangs on the network itself sees the images
    if not carrying or any(g.edits for own in carrying.values() for g in own):  # what changes weights stands not beside
        return None
    like, size = next(model.parameters()), tuple(size or input_size(model, most=None))
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(n, *size, generator=draw).to(like.device, like.dtype) for n in (2, 2, 3)]
    with torch.random.fork_rng(devices=[]), evaluating(model):
        seen, others = watched(model, images[0]), watched(model, images[1])
        names = [c.name for c in seen if c.name in carrying]
        if not names or len(set(names)) < len(names):  # none runs, or one twice
            return None
        before = _own(model, names, images[0])
        with _moved(model, draw):
            after = _own(model, names, images[0])
        still = [n for n in ("", *names) if _same(before[n], after[n])]
        if still[:2] != ["", names[0]]:
            return None
        first = next(c for c in seen if c.name == names[0])
        found = Beside(
            names[0], (sum(before[n][0].numel() for n in still),), stubs(seen, others, first), last=False, size=size,
            hosts=tuple(still[1:]), shapes=tuple(tuple(before[n].shape[1:]) for n in still),
        )  # fmt: skip
        return found if share(model, found) >= least and _sound(found, model, images[2], draw) else None


def _same(one: Any, other: Any) -> bool:
    """Whether something is a tensor with a row for each of two images, and did not move."""
    return (
        isinstance(one, Tensor)
        and one.is_floating_point()
        and one.ndim > 1
        and len(one) == 2
        and torch.equal(one, other)
    )


@contextmanager
def _moved(model: nn.Module, draw: torch.Generator) -> Generator[None]:
    """The model with other trained numbers."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    try:
        for p in trained:
            p.add_(MOVE * torch.randn(p.shape, generator=draw).to(p))
        yield
    finally:
        for p, value in zip(trained, before, strict=True):
            p.copy_(value)


def _sound(found: Beside, model: nn.Module, x: Tensor, draw: torch.Generator) -> bool:
    """Whether the features give what the network gives, also once it has learned, and are the same in training."""
    try:
        features = found.features(model, x)
        same = torch.equal(found.rest(model, features.clone()), model(x))
        with _moved(model, draw):
            same = same and torch.equal(found.rest(model, features.clone()), model(x))
        return same and torch.equal(found.features(model.train(), x), features)
    except (RuntimeError, TypeError, ValueError):  # what a network does with zeros that it didn't expect
        return False
    finally:
        model.eval()

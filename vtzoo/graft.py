"""Graft and prune: hang a trainable child on a live module without renaming anything, and take it off bit for bit.

The host's class is swapped for a subclass made on the fly. Grafts nest in the order written: each wraps what stands
before it, so what runs is what folds, part after part:

    call(i, x) = leave_i(x, call(i-1, enter_i(x))),      call(-1, x) = the host's own forward

A graft that works in weight space can also be *read*: for a host whose parameters are read and never called
(`F.linear(x, self.qkv.weight)`), or whose own forward must see the changed weight (weight-standardised and 'same'
convolutions, norms), the parameter's name becomes a property returning the stored value passed through the grafts'
`read`. The stored parameter, its name and its bits stay.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vtzoo import lean
from vtzoo.errors import UsageError

Scores = Callable[[str], Tensor]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Before:
    """A host's parameters as the grafts before the present one leave them; `base` gives the untouched ones."""

    __slots__ = ("_base", "_get")

    def __init__(self, get: Callable[[str], Tensor], base: Callable[[str], Tensor]) -> None:
        self._get, self._base = get, base

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name)

    def base(self, name: str) -> Tensor:
        """The backbone's own value."""
        return self._base(name)


class Graft(nn.Module):
    """A trainable child at one site. Subclasses override some of `enter`, `leave`, `around`, `read`, `start`, `bind` and `release`.

    Attributes:
        edits: names of the host's parameters it rewrites; empty where the change has no form in plain weights.
        calls: acts when the host is called; otherwise its `edits` are read through `read`.
        rewrites: runs the host by `around`, inside all grafts' `enter` and `leave`.
        rates: factors of the learning rate by the name of a parameter of its own; 1 where it names none.
        undecayed: names of its own matrices that are factors, and rest at one: weight decay is not for them.
        replaces: what it holds stands in the place of the host's parameters, as it is.
        adds: when called on a linear it adds the product of `factors("weight")` to its weight, and does nothing else.
        aside: hands on what the host's own layers make by another way than the host's output.
        shared: what all grafts of the method have in common, hung on the root; None where it has no `Shared`.
    """

    edits: tuple[str, ...] = ()
    calls: bool = True
    rewrites: bool = False
    rates: Mapping[str, float] = MappingProxyType({})
    undecayed: tuple[str, ...] = ()
    replaces: bool = False
    adds: bool = False
    aside: bool = False
    shared: Any = None

    def enter(self, x: Tensor) -> Tensor:
        """Change the host's input."""
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Change the host's output, given the input that came to this graft."""
        return y

    def around(self, host: Any, run: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - the interface
        """Run the host with all that it was given; `run` is its own forward, or the `around` of an earlier graft."""
        return run(x, *args, **kwargs)

    def read(self, name: str, before: Before) -> Tensor:
        """The host's parameter `name` with this graft folded in, given the values before it."""
        raise NotImplementedError(f"{type(self).__name__}.read({name})")

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002 - the interface
        """What it adds to the host's parameter `name`, [out, r] and [r, in], where that is their product whatever was there before."""
        return None

    def start(self, host: nn.Module, scores: Scores) -> None:
        """Take initial values from the host; called once on a fresh graft, not on a loaded one.

        `scores(name)` is how sensitive the loss is to each entry of the host's parameter `name`: see `vtzoo.sensitivity`.
        """

    def pack(self) -> Mapping[str, Tensor]:
        """What a file holds of it: its own tensors, or fewer bits that say as much."""
        return self.state_dict()

    def unpack(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its own tensors from what a file holds; one that lacks a tensor gives back what there is."""
        return tensors

    def share(self, shared: nn.Module) -> None:
        """Refer to what all grafts of the method have in common, without owning it."""
        self.__dict__["shared"] = shared

    def bind(self, host: nn.Module) -> None:
        """Change plain attributes of the host (a count of tokens, say) for as long as the graft hangs."""

    def release(self, host: nn.Module) -> None:
        """Undo `bind`."""


class Shared(Graft):
    """Tensors that all grafts of one method use; hung on the root, it acts when a graft that refers to it does."""

    calls = False


class _Watch:
    """Which grafts ran during a probe; None when nobody watches."""

    seen: set[int] | None = None

    @classmethod
    def note(cls, child: Graft) -> None:
        """It acts, and what it shares with it."""
        if cls.seen is not None:
            cls.seen |= {id(g) for g in (child, child.shared) if g is not None}


@contextmanager
def watching() -> Generator[set[int]]:
    """Collect the `id` of every graft that acts inside the block."""
    _Watch.seen = set()
    try:
        yield _Watch.seen
    finally:
        _Watch.seen = None


def graft(host: nn.Module, name: str, child: Graft) -> None:
    """Hang `child` on `host` as attribute `name`; later grafts wrap earlier ones.

    Raises:
        UsageError: the host is a container (which would run the child as a layer), or the name is taken.
    """
    if isinstance(host, CONTAINERS):
        raise UsageError(f"a {type(host).__name__} can't carry a graft", "target the layers inside it")
    if hasattr(host, name):
        raise UsageError(f"{type(host).__name__} already has an attribute '{name}'", "detach the first delta")
    host.add_module(name, child)
    if not child.calls:  # who is read and stands before must be read too, or the order would differ from fold's
        read = set(child.edits)
        for other in reversed(grafts(host)):
            if not other.adds or read & set(
                other.edits
            ):  # a sum may be added when called: the order makes no difference
                other.calls = other.calls and not other.edits
            read |= set() if other.calls else set(other.edits)
    host.__dict__["_graft_names"] = (*host.__dict__.get("_graft_names", ()), name)
    _dress(host)
    child.bind(host)


def prune(host: nn.Module) -> None:
    """Take every graft off; the host's class and attributes are again what they were."""
    for child in grafts(host):
        child.release(host)
    for name in host.__dict__.pop("_graft_names", ()):
        del host._modules[name]
    _dress(host)


def freeze_statistics(host: nn.Module, frozen: bool = True) -> None:
    """Keep a norm's running statistics as they are, whatever `model.train()` says; or let go again."""
    if frozen:
        host.__dict__["_frozen_statistics"] = True
        host.eval()
    else:
        host.__dict__.pop("_frozen_statistics", None)
    _dress(host)


def has_statistics(module: nn.Module) -> bool:
    """Whether training mode would change the module's buffers (BatchNorm and its kin)."""
    return getattr(module, "running_mean", None) is not None or getattr(module, "running_var", None) is not None


def grafts(host: nn.Module) -> list[Graft]:
    """The grafts on one host, innermost first."""
    return [host._modules[name] for name in host.__dict__.get("_graft_names", ())]  # type: ignore[misc] - only Grafts are hung here


@contextmanager
def owning(host: nn.Module, run: Callable[..., Any]) -> Generator[None]:
    """Let `run(own, x, …)` stand for a host's own forward, which it gets first, with its grafts about it."""
    host.__dict__["_owned"] = run
    try:
        yield
    finally:
        del host.__dict__["_owned"]


def hosts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module that carries a graft, by name."""
    return [(n, m) for n, m in model.named_modules() if m.__dict__.get("_graft_names")]


def stored(host: nn.Module, name: str) -> Tensor:
    """A parameter or buffer as stored, whatever is grafted on its host."""
    value = host._parameters[name] if name in host._parameters else host._buffers[name]
    if value is None:
        raise AttributeError(name)
    return value


def _value(host: nn.Module, name: str, upto: int) -> Tensor:
    """Parameter `name` after the first `upto` grafts."""
    children = grafts(host)
    for i in reversed(range(upto)):
        child = children[i]
        if not child.calls and name in child.edits:
            _Watch.note(child)
            return child.read(name, Before(lambda n: _value(host, n, i), lambda n: stored(host, n)))  # noqa: B023 - used at once
    return stored(host, name)


class _Host:
    """What a host's class gets in addition; see the module's docstring."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        children = [g for g in grafts(self) if g.calls]  # type: ignore[arg-type] - always mixed into an nn.Module
        x, inputs = entered(children, x)
        run = super().forward  # type: ignore[misc] - the host's own
        if "_owned" in self.__dict__:
            run = partial(self.__dict__["_owned"], run)
        for child in children:
            if child.rewrites:
                run = partial(child.around, self, run)
        if _leanly(self, children):
            first = children.pop(0)
            inputs.pop()
            _Watch.note(first)
            run = partial(_with_product, self, first)
        return left(children, inputs, run(x, *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, reads, calls, frozen = self._vtzoo_made_from  # type: ignore[attr-defined] - set by _host_class
        return _rebuild, (base, reads, calls, frozen), self.__dict__


def entered(children: Sequence[Graft], x: Any) -> tuple[Any, list[Any]]:
    """What a host is given behind its grafts, the last of them first, and what each of them was given."""
    inputs: list[Any] = []
    for child in reversed(children):
        inputs.append(x)
        x = _like(x, child.enter(x))
    return x, inputs


def left(children: Sequence[Graft], inputs: list[Any], y: Any) -> Any:
    """What its grafts make of a host's output, given what `entered` noted, which is used up."""
    for child in children:
        _Watch.note(child)
        y = _like(y, child.leave(inputs.pop(), y))
    return y


def _leanly(host: Any, children: list[Graft]) -> bool:
    """Whether the first graft and its host can run as one (see `vtzoo.lean`)."""
    if not children or not children[0].adds or any(g.rewrites for g in children):
        return False
    base, reads, *_ = host._vtzoo_made_from
    return base.forward is nn.Linear.forward and reads <= {"bias"} and lean.applies(*host._parameters.values())


def _with_product(host: Any, child: Graft, x: Tensor) -> Tensor:
    """The host with its first graft."""
    factors = child.factors("weight")
    assert factors is not None
    return lean.linear(x, stored(host, "weight"), host.bias, *factors)


def _like(before: Any, after: Any) -> Any:
    """What a graft made, in the type that was there: under autocast its own float32 numbers would slow all that follows."""
    if isinstance(before, Tensor) and isinstance(after, Tensor) and after.dtype != before.dtype:
        return after.to(before.dtype)
    return after


def _rebuild(base: type, reads: frozenset[str], calls: bool, frozen: bool) -> nn.Module:
    made: Any = _host_class(base, reads, calls, frozen)
    return made.__new__(made)


def _dress(host: nn.Module) -> None:
    """Give the host the class that its grafts need."""
    base = getattr(type(host), "_vtzoo_made_from", (type(host),))[0]
    children = grafts(host)
    reads = frozenset(n for g in children if not g.calls for n in g.edits)
    frozen = host.__dict__.get("_frozen_statistics", False)
    plain = not children and not frozen
    host.__class__ = base if plain else _host_class(base, reads, any(g.calls for g in children), frozen)


@cache
def _host_class(base: type, reads: frozenset[str], calls: bool, frozen: bool) -> type:
    members: dict[str, Any] = {n: property(_reader(n)) for n in reads}
    members["_vtzoo_made_from"] = (base, reads, calls, frozen)
    members["__reduce_ex__"] = _Host.__reduce_ex__
    if frozen:
        members["train"] = lambda self, mode=True: base.train(self, False)  # type: ignore[attr-defined] # noqa: ARG005 - statistics stay
    return type(f"Grafted{base.__name__}", (_Host, base) if calls else (base,), members)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(self: nn.Module) -> Tensor:
        kept = stored(self, name)
        if hasattr(kept, "placements"):  # FSDP looks at the part that it keeps; in a forward pass the whole stands here
            return kept
        return _value(self, name, len(grafts(self)))

    return read


def nature(module: nn.Module) -> tuple[Any, frozenset[str]]:
    """A module's own class, and which of its parameters are read through grafts."""
    base, reads, *_ = getattr(type(module), "_vtzoo_made_from", (type(module), frozenset[str]()))
    return base, reads


def own_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """The parameters stored on this very module (not its children), without the absent ones."""
    return {n: p for n, p in module._parameters.items() if p is not None}


def own_tensors(module: nn.Module) -> bool:
    """Whether a module itself, not its children, owns parameters or buffers."""
    return any(t is not None for t in [*module._parameters.values(), *module._buffers.values()])


def named_grafts(model: nn.Module) -> list[tuple[str, Graft]]:
    """Every graft with the prefix of its tensors' names, `<site>.<graft>.`."""
    return [
        (f"{site}.{name}.".lstrip("."), child)
        for site, host in hosts(model)
        for name, child in zip(host.__dict__["_graft_names"], grafts(host), strict=True)
    ]


def named_bare(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by name but those that grafts are made of."""
    inside = tuple(prefix for prefix, _ in named_grafts(model))
    return [(n, m) for n, m in model.named_modules() if not f"{n}.".startswith(inside)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that grafts own, named `<site>.<graft>.<param>`."""
    return {p + k: v for p, child in named_grafts(model) for k, v in child.state_dict(keep_vars=True).items()}


def rates(model: nn.Module) -> dict[str, float]:
    """Factors of the learning rate that grafts ask for, by full name of the parameter."""
    return {p + own: rate for p, child in named_grafts(model) for own, rate in child.rates.items()}


def undecayed(model: nn.Module) -> frozenset[str]:
    """Full names of the parameters that grafts want without weight decay."""
    return frozenset(p + own for p, child in named_grafts(model) for own in child.undecayed)

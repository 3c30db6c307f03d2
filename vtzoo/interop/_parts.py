"""From tensors by site to a delta: methods and knobs spelled out, shapes compared, targets named in few words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtzoo import knobs as K
from vtzoo import registry
from vtzoo.anatomy import Anatomy, Site
from vtzoo.delta import HEAD, Delta, Part
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.rebuilt import rebuild
from vtzoo.spec import BackboneCard, Task


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One method's share of a foreign file: our tensors by site."""

    method: str
    knobs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sites: Mapping[str, tuple[Site, Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a foreign file can't say of a delta."""

    card: BackboneCard
    task: Task | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])


def assemble(pieces: Sequence[Piece], head: Mapping[str, Tensor], origin: Origin) -> Delta:
    """A delta; several pieces make a stack.

    Raises:
        ShapeMismatch: a tensor has another shape than the method would give it.
        UsageError: knobs that the method does not take.
    """
    parts: list[Part] = []
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        module = registry.load("methods", piece.method)
        config = K.decode(module.Config, piece.knobs, piece.method)
        name, count = piece.method.replace("-", "_"), sum(p.method == piece.method for p in parts)
        name += f"_{count + 1}" if count else ""
        for site, own in piece.sites.values():
            _check(site, own, rebuild(module, site, config).state_dict())
            tensors |= {f"{site.key(name)}.{n}": widened(t) for n, t in own.items()}
        sites = tuple(site for site, _ in piece.sites.values())
        parts.append(Part(method=piece.method, graft=name, knobs=K.encode(config), sites=sites))
    if origin.task:
        tensors |= {f"{HEAD}{origin.task.name}/{n}": widened(t) for n, t in head.items()}
    return Delta(
        method="+".join(_spelled(p) for p in parts), parts=tuple(parts), backbone=origin.card, tensors=tensors, metrics=origin.metrics,
        recipe=origin.recipe, lineage=origin.lineage, tasks=(origin.task,) if origin.task else (),
    )  # fmt: skip


def widened(tensor: Tensor) -> Tensor:
    """At least float32, as deltas are kept; whole numbers as they are."""
    short = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.float() if short else tensor).contiguous()


def words(anatomy: Anatomy, names: Iterable[str]) -> tuple[str, ...]:
    """The shortest targets that choose these sites and no other: auto, last names, or all in full."""
    wanted = set(names)
    last = tuple(sorted({n.rpartition(".")[2] for n in wanted}))
    for targets in (("auto",), last):
        try:
            found = {s.name for s in anatomy.select(targets)}
        except UsageError:
            continue
        if found == wanted:
            return targets
    return tuple(sorted(wanted))


def _check(site: Site, own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if odd := sorted(set(own) ^ set(wanted)):
        raise ShapeMismatch(
            f"{site.name} {'lacks' if odd[0] in wanted else 'has no place for'} {odd[0]}", "is the file complete?"
        )
    for name, tensor in own.items():
        if tensor.shape != wanted[name].shape:
            raise ShapeMismatch(
                f"{site.key(name)} is {list(tensor.shape)} in the file, {list(wanted[name].shape)} on this backbone",
                "is it the backbone that the file was made for?",
            )


def _spelled(part: Part) -> str:
    """Method and knobs as a person would write them, defaults left out."""
    default = K.encode(K.decode(part.module.Config, {}, part.method))
    changed: dict[str, str | list[str]] = {k: _text(v) for k, v in part.knobs.items() if v != default[k]}
    return str(K.Part(part.method, changed))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "|".join(map(str, value)) or "[]"
    return f"{value:.17g}" if isinstance(value, float) else str(value)

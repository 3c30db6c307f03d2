"""Grafts as a delta holds them: rebuilt from its tensors without a model, or their shapes alone."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from vtzoo.anatomy import Site
from vtzoo.delta import Part
from vtzoo.graft import Graft
from vtzoo.tensors import prefixed

Common = Callable[[torch.dtype | None], Graft | None]


def rebuild(
    module: Any, site: Site, config: Any, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> Graft:
    """A graft as it was saved; without tensors, its shape only (on the meta device)."""
    return _rebuilt(lambda: module.Graft(site, config), tensors, dtype)


@dataclass(frozen=True)
class _Shape:
    """What a graft's shape depends on; site and config are told apart by their text, since they may hold lists."""

    module: Any
    text: str
    build: Callable[[], Graft] = field(compare=False)


@lru_cache(maxsize=1 << 12)
def _skeleton(shape: _Shape) -> Graft:
    return shape.build()


def skeleton(module: Any, site: Site, config: Any) -> Graft:
    """A graft's shape only (on the meta device), built once for all that ask, who leave it as it is."""
    knobs = [(f.name, getattr(config, f.name)) for f in fields(config)] if is_dataclass(config) else config
    return _skeleton(_Shape(module, f"{site} {type(config)} {knobs}", lambda: rebuild(module, site, config)))


def rebuild_shared(part: Part, tensors: Mapping[str, Tensor] | None = None) -> Common:
    """What the grafts of a part share, in any dtype asked for; None where they share nothing."""

    @cache
    def make(dtype: torch.dtype | None) -> Graft | None:
        if not hasattr(part.module, "Shared"):
            return None
        return _rebuilt(lambda: part.module.Shared(part.sites, part.config), tensors, dtype)

    return make


def _rebuilt(build: Callable[[], Graft], tensors: Mapping[str, Tensor] | None, dtype: torch.dtype | None) -> Graft:
    with torch.device("meta"):
        child = build()
    if tensors is not None:
        if any(m._non_persistent_buffers_set for m in child.modules()):  # noqa: SLF001 - constants that no file holds
            child = build()
        own = child.state_dict()
        child.load_state_dict(
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in child.unpack(tensors).items() if k in own},
            assign=True,
        )
        child.to(dtype).requires_grad_(False)
    return child.eval()


@dataclass(frozen=True)
class Saved:
    """A graft as a delta holds it.

    Attributes:
        module: of its method.
        site: where it sits.
        config: the method's knobs.
        prefix: of its tensors' names, `<site>.<graft>.`.
        tensors: all of the delta's; may be lazy.
        names: those of its own.
        common: gives what all grafts of the part share.
    """

    module: Any
    site: Site
    config: Any
    prefix: str
    tensors: Mapping[str, Tensor]
    names: Sequence[str]
    common: Common

    @property
    def skeleton(self) -> Graft:
        """Its shape only."""
        return skeleton(self.module, self.site, self.config)

    def own(self) -> dict[str, Tensor]:
        """Its tensors, read now."""
        return {n[len(self.prefix) :]: self.tensors[n] for n in self.names}

    def graft(self, own: Mapping[str, Tensor], kind: torch.dtype) -> Graft:
        """Itself, and with what it shares."""
        child = rebuild(self.module, self.site, self.config, own, kind)
        if (shared := self.common(kind)) is not None:
            child.share(shared)
        return child


def saved_grafts(tensors: Mapping[str, Tensor], part: Part) -> Iterator[Saved]:
    """The grafts of a part."""
    module, config, names = part.module, part.config, sorted(tensors)
    common = rebuild_shared(part, prefixed(tensors, f"{part.graft}."))
    for site in part.sites:
        prefix = f"{site.key(part.graft)}."
        own = names[bisect_left(names, prefix) : bisect_left(names, f"{prefix[:-1]}/")]  # "/" comes after "."
        yield Saved(module, site, config, prefix, tensors, own, common)

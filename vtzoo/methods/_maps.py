"""Shared by the methods that convolve over what a block carries: a map as it is, a sequence of tokens as the map it is.

A sequence is taken for a map where it is proven to be one: a guide, an earlier module that gives a map [batch, channels,
h, w] (or [batch, h, w, channels]), is changed at a few places, and in what the block is then given just their tokens may
differ, counted row by row behind the class and register tokens. In each forward the guide notes h and w, so that other
image sizes work; the two numbers stay until the next forward, since recomputing a block (checkpointing) reads them again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import channels
from vtzoo.methods._branches import AXES, before, enclosing
from vtzoo.methods._side import thread
from vtzoo.probing import evaluating, input_size

ANY = -1  # no thread's number


class Notes(graft.Shared):
    """What grafts tell each other within a forward, thread by thread: `grids` of guides, tensors `held` from one to the next."""

    def __init__(self, sites: Sequence[Site], config: object) -> None:  # noqa: ARG002 - every Shared takes both
        super().__init__()
        self.grids: dict[tuple[int, str], tuple[int, int]] = {}
        self.held: dict[tuple[int, str], list[Tensor]] = {}

    def grid(self, guide: str) -> tuple[int, int]:
        """What a guide noted in this thread, or last in any: a backward pass on a GPU recomputes blocks in one of its own."""
        return self.grids.get((thread(), guide)) or self.grids[ANY, guide]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}


class Mapped(graft.Graft):
    """A graft that sees maps. Subclasses override `act`, unless the site is `bare`: a guide, or one that keeps a tensor."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        facts = site.facts
        self.name, self.bare = site.name, bool(facts.get("bare"))
        self.axis: int = facts["axis"]
        self.channels = channels(site)
        self.guide, self.marks, self.keeps, self.source = (
            facts.get(k, "") for k in ("guide", "marks", "keeps", "source")
        )

    def enter(self, x: Tensor) -> Tensor:
        """Take note of the input."""
        self._note("x", x)
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Take note of the output, and act on it."""
        self._note("y", y)
        return y if self.bare else self.act(x, y)

    def act(self, x: Tensor, y: Tensor) -> Tensor:
        """The output with this graft's part."""
        raise NotImplementedError(type(self).__name__)

    def given(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The last that the source kept in y's shape, once (None where it was taken); x where there is no source.

        Another method may have sent prompts alone through the source in the meantime.
        """
        if not self.source:
            return x
        kept = self.shared.held.pop((thread(), self.source), [])
        return next((t for t in reversed(kept) if t.shape == y.shape), None)

    def spread(self, z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f, which takes maps [n, channels, h, w], over z [..., channels]; tokens before the patches are maps of one place.

        How many those are is seen anew, since prompts of another method may stand among them, or pass all alone.
        """
        if z.ndim == AXES:
            return f(z.movedim(-1, 1)).movedim(1, -1)
        h, w = self.shared.grid(self.guide)
        first = z.shape[1] - h * w if z.shape[1] >= h * w else z.shape[1]
        parts: list[Tensor] = []
        if first:
            alone = f(z[:, :first].flatten(0, 1)[:, :, None, None])[:, :, 0, 0]
            parts.append(alone.unflatten(0, (-1, first)))
        if first < z.shape[1]:
            parts.append(f(z[:, first:].unflatten(1, (h, w)).movedim(-1, 1)).flatten(2).mT)
        return torch.cat(parts, dim=1)

    def _note(self, which: str, value: Tensor) -> None:
        if self.marks == which:
            for key in (thread(), ANY):
                self.shared.grids[key, self.name] = _grid(value.shape, self.axis)
        if self.keeps == which:
            self.shared.held.setdefault((thread(), self.name), []).append(value)


def lay(anatomy: Anatomy, wanted: Sequence[Site], more: Sequence[Site] = ()) -> list[Site]:
    """The wanted sites with what `Mapped` must know; their guides and `more`, which are bare unless wanted too.

    Sites that carry class tokens alone (CaiT's last blocks) are left out.

    Raises:
        UsageError: some sequence is not a map row by row.
    """
    found: dict[str, Site] = {}
    proven: dict[tuple[str, str], bool] = {}
    for site in wanted:
        if len(anatomy.seen[site.name].y) < AXES:
            count = _count(anatomy, site)
            if count <= anatomy.prefix:
                continue
            guide = _guide(anatomy, site, count, proven)
            _add(found, replace(site, facts={**site.facts, "guide": guide.name}))
            _add(found, guide)
        else:
            _add(found, site)
    for site in more:
        _add(found, site)
    order = {n: i for i, n in enumerate(anatomy.modules)}
    return sorted(found.values(), key=lambda s: order[s.name])


def _add(found: dict[str, Site], site: Site) -> None:
    """Two roles at one module are one site."""
    old = found.get(site.name)
    if old is None:
        found[site.name] = site
        return
    facts: Mapping[str, Any] = {**old.facts, **site.facts}
    both = old.facts.get("bare") and site.facts.get("bare")
    found[site.name] = replace(old, facts={k: v for k, v in facts.items() if k != "bare" or both})


def _grid(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """h and w of a map's shape with its batch."""
    return (shape[2], shape[3]) if axis == 1 else (shape[1], shape[2])


def _count(anatomy: Anatomy, site: Site) -> int:
    """How many tokens a site carries."""
    return anatomy.seen[site.name].y[2 if site.facts["axis"] == 1 else 1]


def _guide(anatomy: Anatomy, site: Site, count: int, proven: dict[tuple[str, str], bool]) -> Site:
    """The module whose map a site's tokens are, as a bare site."""
    block = enclosing(anatomy, site)
    if len(anatomy.seen[block.name].x) == AXES:  # a map that the block flattens: Swin's, for its MLP
        axis, name = anatomy.channel_axis(block.name), before(anatomy, block.name, site.name)
        pairs = [(name, site.name)] if name else []
    else:
        order = {n: i for i, n in enumerate(anatomy.seen)}
        outside = [c.name for c in anatomy.convs if c.called and "blocks" not in anatomy.roles(c)]
        names = sorted((n for n in outside if order[n] < order[site.name]), key=order.__getitem__, reverse=True)
        after = {n: next((b.name for b in anatomy.blocks if order[b.name] > order[n]), block.name) for n in names}
        axis, pairs = 1, [(n, after[n]) for n in names]
    for name, first in pairs if anatomy.seen[site.name].y[0] == 1 else ():
        if not _fits(anatomy, name, axis, count):
            continue
        if (name, first) not in proven:
            proven[name, first] = _row_by_row(anatomy, name, axis, first, count)
        if proven[name, first]:
            return anatomy.module(name, axis=axis, bare=True, marks="y")
    raise UsageError(
        f"the tokens of {site.name} are not a map row by row (windows, unfolded patches or an order of their own), so there is nothing to convolve over",
        "use adapter, adaptformer or lora instead",
    )


def _fits(anatomy: Anatomy, name: str, axis: int, count: int) -> bool:
    h, w = _grid(anatomy.seen[name].y, axis)
    return count - h * w in {0, anatomy.prefix}


class _Enough(Exception):
    """What a trial wants has been seen."""


@torch.no_grad()
def _row_by_row(anatomy: Anatomy, guide: str, axis: int, host: str, count: int) -> bool:
    """Whether changing a place of the guide's map changes just that place's token in what the host is given."""
    model, (h, w) = anatomy.model, _grid(anatomy.seen[guide].y, axis)
    places = [(0, w - 1), (h - 1, 0), (h // 2, w // 2)]
    seen: list[Tensor] = []

    def change(_module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        y = y.clone()
        last = y.movedim(axis, -1)  # a view
        for i, (row, column) in enumerate(places if len(y) > len(places) else ()):
            last[i + 1, row, column] += torch.linspace(-1, 1, last.shape[-1], dtype=y.dtype, device=y.device) ** 2
        return y

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Enough

    like = next(model.parameters())
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    images = image.repeat(len(places) + 1, 1, 1, 1).to(like.device, like.dtype)
    handles = [
        anatomy.modules[guide].register_forward_hook(change),
        anatomy.modules[host].register_forward_pre_hook(look),
    ]
    try:
        with evaluating(model), suppress(_Enough):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or len(seen[0]) != len(images):  # a map of no image's own, say of positions
        return False
    tokens = seen[0] if seen[0].shape[1] == count else seen[0].mT
    if tokens.shape[:2] != (len(images), count):
        return False
    moved = (tokens[1:] - tokens[:1]).abs().amax(-1)
    wanted = torch.zeros_like(moved, dtype=torch.bool)
    for i, (row, column) in enumerate(places):
        wanted[i, count - h * w + row * w + column] = True
    return torch.equal(moved > 1e-3 * moved.max(), wanted)

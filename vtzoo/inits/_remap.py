"""One tensor in the sizes of another network: what is in space is resampled, classes go by their labels, widths as the way says."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtzoo.axes import CLASSES, IN, KERNEL, OFFSETS, OUT, PATCH, PIXELS, PLACES, Axes, Axis
from vtzoo.errors import ShapeMismatch
from vtzoo.inits._plan import Plan


@dataclass(frozen=True, slots=True)
class Width:
    """A dimension to be brought to another size.

    Attributes:
        name: the tensor's in the target.
        other: its name in the source.
        value: with the new sizes in all dimensions behind this one.
        dim: which.
        old: what it is in the source: OUT or IN.
        new: what it is to be.
        like: the target's present tensor.
    """

    name: str
    other: str
    value: Tensor
    dim: int
    old: Axis
    new: Axis
    like: Tensor

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the old axis and the new, as many of both and in one order.

        What is one group here may be several there, of the same width; what has one head is in either order.
        """
        a, b = self.old.parts, self.new.parts
        if self.old.turned != self.new.turned:
            a, b = ((a[1], a[0], a[2]), b) if self.new.turned else (a, (b[1], b[0], b[2]))
        if {len(a), len(b)} == {1, 2} and not any(n % max(a, b, key=len)[-1] for n in (self.old.size, self.new.size)):
            last = max(a, b, key=len)[-1]
            return (self.old.size // last, last), (self.new.size // last, last)
        return (a, b) if len(a) == len(b) else ((self.old.size,), (self.new.size,))


def remapped(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    plan: Plan,
    pairs: Iterable[tuple[str, str]],
    widths: Callable[[Width], Tensor],
) -> dict[str, Tensor]:
    """The new tensors of the target.

    Args:
        source: the tensors that are given.
        target: the present ones.
        plan: of both networks.
        pairs: names in the target and in the source.
        widths: brings one dimension of kind OUT or IN to its new size.
    """
    found: dict[str, Tensor] = {}
    for name, other in pairs:
        like, old, new = target[name], plan.source.axes[other], plan.target.axes[name]
        value = source[other].detach().to(like.device, like.dtype)
        value = _resampled(value, old, new)
        for dim in reversed(range(value.ndim)):
            if new[dim].kind in (OUT, IN) and old[dim].kind in (OUT, IN):
                value = widths(Width(name, other, value, dim, old[dim], new[dim], like))
        if new and new[0].kind == CLASSES:
            value = _labelled(value, like, plan.classes)
        if value is not None and value.shape == like.shape:
            found[name] = value.clone()
    return found


def differing(plan: Plan, pairs: Iterable[tuple[str, str]], kinds: Sequence[str]) -> str:
    """In words, the first tensor that is of two sizes along a dimension of one of these kinds; empty where there is none."""
    for name, other in pairs:
        for a, b in zip(plan.source.axes[other], plan.target.axes[name], strict=True):
            if b.kind in kinds and a.size != b.size:
                shapes = (
                    [x.size for x in axes[n]] for axes, n in ((plan.source.axes, other), (plan.target.axes, name))
                )
                return "{} is {} there and {} here".format(name, *shapes)
    return ""


def picked(width: Width, indices: Callable[[int, int], Sequence[int]]) -> Tensor:
    """Some or all of what is along a dimension, part by part."""
    old, new = width.parts
    value = width.value.unflatten(width.dim, old)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a != b:
            value = value.index_select(width.dim + i, torch.tensor(indices(a, b), device=value.device))
    return value.flatten(width.dim, width.dim + len(new) - 1)


def centred(value: Tensor, dim: int, size: int) -> Tensor:
    """A kernel cut around its middle, or with zeros around it."""
    was = value.shape[dim]
    if size <= was:
        return value.narrow(dim, (was - size) // 2, size)
    grown = value.new_zeros([*value.shape[:dim], size, *value.shape[dim + 1 :]])
    grown.narrow(dim, (size - was) // 2, was).copy_(value)
    return grown


def _resampled(value: Tensor, old: Axes, new: Axes) -> Tensor:
    """With the new size of everything that is in space; where that can't be, as it is."""
    kinds, sizes = {a.kind for a in new}, [a.size for a in new]
    if PATCH in kinds and list(value.shape[2:]) != sizes[2:]:
        from timm.layers.patch_embed import resample_patch_embed

        value = resample_patch_embed(value, sizes[2:])
    if PIXELS in kinds and value.shape[1] != sizes[1]:
        value = _coloured(value, sizes[1])
    if PLACES in kinds:
        value = _placed(value, old[1], new[1])
    if OFFSETS in kinds and old[0].size != new[0].size:
        value = _windowed(value, old[0], new[0])
    for dim, axis in enumerate(new):
        if axis.kind == KERNEL:
            value = centred(value, dim, axis.size)
    return value


def _coloured(value: Tensor, channels: int) -> Tensor:
    """The first convolution's kernels for images of other channels: their sum for one, else repeated and scaled."""
    from timm.models import adapt_input_conv

    return adapt_input_conv(channels, value) if channels == 1 or value.shape[1] == 3 else value


def _placed(value: Tensor, old: Axis, new: Axis) -> Tensor:
    """Position embeddings [1, tokens, width] of another grid; a token before the patches that has none in the source gets zeros."""
    if old.grid is None or new.grid is None or (old.size, old.grid) == (new.size, new.grid):
        return value
    from timm.layers.pos_embed import resample_abs_pos_embed

    before, after = old.size - old.grid[0] * old.grid[1], new.size - new.grid[0] * new.grid[1]
    patches = resample_abs_pos_embed(value[:, before:], list(new.grid), list(old.grid), num_prefix_tokens=0)
    more = value.new_zeros(1, max(0, after - before), value.shape[2])
    return torch.cat((value[:, : min(before, after)], more, patches), 1)


def _windowed(value: Tensor, old: Axis, new: Axis) -> Tensor:
    """A table of relative positions [offsets, heads] for another window."""
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    if old.grid is None or new.grid is None:
        return value
    oblong = {} if old.grid[0] == old.grid[1] else {"old_window_size": old.grid}  # not known to older versions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on how timm interpolates
        return resize_rel_pos_bias_table(value, new.grid, (new.size, value.shape[1]), **oblong)


def _labelled(value: Tensor, like: Tensor, classes: Sequence[int | None]) -> Tensor | None:
    """A head's rows by label, those of new labels as they are; nothing where no label is known."""
    if value.shape[1:] != like.shape[1:] or all(c is None for c in classes):
        return None
    rows = like.detach().clone()
    for row, known in enumerate(classes):
        if known is not None:
            rows[row] = value[known]
    return rows


def kept(width: Width) -> Tensor:
    """A dimension whose size must not change, nor what it falls into: as many heads of another width are another function.

    Raises:
        ShapeMismatch: it does.
    """
    if width.parts[0] != width.parts[1]:
        raise wrong(width, "this way changes no widths", "take --init weight-selection, net2net or fna")
    return width.value


def wrong(width: Width, why: str, hint: str) -> ShapeMismatch:
    """A refusal of one dimension."""
    old, new = width.parts
    said = " x ".join(map(str, old)), " x ".join(map(str, new))
    return ShapeMismatch(f"{width.name} has {said[0]} channels in the source and {said[1]} in the student: {why}", hint)

"""What the dimensions of a network's tensors are: which are summed over, which are heads, positions or kernels.

Read from the live modules by their structure, so that weights can be taken from one network to another of its kind with other sizes
(`vtzoo.inits`). Nothing links the axes of two layers; instead every rule of `vtzoo.inits` depends on an axis's old and new parts alone, so
that layers which pass each other the same channels have them in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, survey
from vtzoo.axes import CLASSES, FIXED, IN, KERNEL, OFFSETS, OUT, PATCH, PIXELS, PLACES, Axes, Axis, attentions, joined
from vtzoo.fingerprint import base_state
from vtzoo.graft import named_bare, own_parameters
from vtzoo.installed import head_state

NORMALISING = ("layernorm", "rmsnorm", "groupnorm", "simplenorm", "response")


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is known of one network.

    Attributes:
        name: its class, for messages.
        axes: of every tensor, by full name.
        rows: names of its blocks in order, stage after stage.
        normalised: names of the scales of norms that take their statistics over channels.
    """

    name: str
    axes: Mapping[str, Axes]
    rows: tuple[tuple[str, ...], ...]
    normalised: frozenset[str]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A network's own tensors, its head's among them; grafts left out."""
    return {**base_state(model), **head_state(model)}


def sketched(model: nn.Module) -> Sketch:
    """Look at a network: one forward of an image, and some of its attention."""
    anatomy = survey(model)
    modules = dict(named_bare(model))
    known = attentions(anatomy, modules) | joined(modules)
    groups = _groups(modules)
    axes: dict[str, Axes] = {}
    for name, tensor in state_of(model).items():
        owner, _, last = name.rpartition(".")
        module = modules.get(owner, model)
        own = known.get(name) or _own(anatomy, owner, module, last, tensor)
        axes[name] = tuple(_grouped(a, groups) for a in own)
    return Sketch(
        name=type(model).__name__,
        axes=axes,
        rows=_rows(anatomy),
        normalised=frozenset(
            f"{n}.weight"
            for n, m in modules.items()
            if "weight" in own_parameters(m) and any(n in type(m).__name__.lower() for n in NORMALISING)
        ),
    )


def _rows(anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    rows: dict[str, list[str]] = {}
    for block in anatomy.blocks:
        rows.setdefault(block.name.rpartition(".")[0], []).append(block.name)
    return tuple(map(tuple, rows.values()))


def _own(anatomy: Anatomy, owner: str, module: nn.Module, last: str, tensor: Tensor) -> Axes:
    """The axes of a tensor that nothing around its module says more of."""
    shape = tuple(tensor.shape)
    if isinstance(module, nn.Linear | nn.Conv2d) and last in ("weight", "bias"):
        first = Axis(CLASSES if _classifies(anatomy, owner, shape[0]) else OUT, shape[:1])
        return (first, *_inputs(anatomy, owner, module)) if last == "weight" else (first,)
    if "pos_embed" in last and len(shape) == 3:
        patches, tokens = (
            getattr(anatomy.model, n, None) for n in ("patch_embed", "tokens_spatial_shape")
        )  # the latter is Hiera's
        grid = _sides(getattr(patches, "grid_size", None) or tokens)
        return Axis(FIXED, shape[:1]), Axis(PLACES, shape[1:2], grid), Axis(OUT, shape[2:])
    if last == "relative_position_bias_table" and len(shape) == 2:
        return Axis(OFFSETS, shape[:1], _sides(getattr(module, "window_size", None))), Axis(OUT, shape[1:])
    channel = len(shape) - 1 if shape[:1] == (1,) != shape[-1:] else 0  # of a token, or of what there is for each head
    return tuple(Axis(OUT if i == channel else FIXED, (n,)) for i, n in enumerate(shape))


def _sides(value: Any) -> tuple[int, int] | None:
    return (value[0], value[1]) if isinstance(value, tuple | list) and len(value) == 2 else None


def _classifies(anatomy: Anatomy, owner: str, size: int) -> bool:
    return owner in anatomy.head and size == getattr(anatomy.model, "num_classes", None)


def _inputs(anatomy: Anatomy, owner: str, module: nn.Linear | nn.Conv2d) -> Axes:
    """All axes of a weight but the first."""
    shape, stem = tuple(module.weight.shape), owner == anatomy.stem
    if isinstance(module, nn.Linear):
        return (Axis(IN, shape[1:]),)
    apart = stem and tuple(module.stride) == shape[2:] and max(shape[2:]) > 1
    kind = PIXELS if stem else FIXED if module.groups == module.in_channels > 1 else IN
    return Axis(kind, shape[1:2]), *(Axis(PATCH if apart else KERNEL, (n,)) for n in shape[2:])


def _groups(modules: Mapping[str, nn.Module]) -> dict[int, tuple[int, int]]:
    """Widths that a grouped convolution takes, with its groups."""
    convs = [m for m in modules.values() if isinstance(m, nn.Conv2d) and 1 < m.groups < m.in_channels]
    return {n: (m.groups, n // m.groups) for m in convs for n in (m.in_channels, m.out_channels)}


def _grouped(axis: Axis, groups: Mapping[int, tuple[int, int]]) -> Axis:
    plain = axis.kind in (OUT, IN) and len(axis.parts) == 1
    return replace(axis, parts=groups[axis.size]) if plain and axis.size in groups else axis

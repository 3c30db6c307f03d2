"""What the dimensions of a network's tensors are: which are summed over, which are heads, positions or kernels.

Read from the live modules by their structure, so that weights can be taken from one network to another of its kind with other sizes
(`vtzoo.inits`). Nothing links the axes of two layers; instead every rule of `vtzoo.inits` depends on an axis's old and new parts alone, so
that layers which pass each other the same channels have them in the same order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, survey
from vtzoo.fingerprint import base_state
from vtzoo.graft import named_bare, own_parameters
from vtzoo.live import head_state

OUT, IN, FIXED = "out", "in", "fixed"
KERNEL, PATCH, PIXELS = "kernel", "patch", "pixels"
PLACES, OFFSETS, CLASSES = "places", "offsets", "classes"
HEADED = {"q", "k", "v", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v", "query", "key", "value"}
LEAVING = {"proj", "out_proj", "to_out", "output"}
NORMALISING = ("layernorm", "rmsnorm", "groupnorm", "simplenorm", "response")


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a tensor.

    Attributes:
        kind: OUT (one for each channel that a layer gives), IN (summed over), FIXED; KERNEL; PATCH, a kernel that no neighbours share; PIXELS, the image's channels;
            PLACES, positions of tokens; OFFSETS, relative ones; CLASSES of the head.
        parts: sizes whose product is the dimension's: (3, heads, head width) of a fused qkv, (groups, channels of each).
        grid: [height, width] of PLACES without what stands before the patches, of the window of OFFSETS.
        rigid: the last part is a head's width, by which attention scales its scores.
        turned: of a fused qkv, heads stand before queries, keys and values; with one head both orders are the same.
    """

    kind: str
    parts: tuple[int, ...]
    grid: tuple[int, int] | None = None
    rigid: bool = False
    turned: bool = False

    @property
    def size(self) -> int:
        """Of the dimension."""
        size = 1
        for part in self.parts:
            size *= part
        return size


Axes = tuple[Axis, ...]


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
    known = _attentions(anatomy, modules) | _joined(modules)
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
        grid: Any = getattr(getattr(anatomy.model, "patch_embed", None), "grid_size", None)
        grid = grid or getattr(anatomy.model, "tokens_spatial_shape", None)  # Hiera's
        return Axis(FIXED, shape[:1]), Axis(PLACES, shape[1:2], grid and tuple(grid)), Axis(OUT, shape[2:])
    if last == "relative_position_bias_table" and len(shape) == 2:
        window: Any = getattr(module, "window_size", None)
        return Axis(OFFSETS, shape[:1], window and tuple(window)), Axis(OUT, shape[1:])
    channel = len(shape) - 1 if shape[:1] == (1,) != shape[-1:] else 0  # of a token, or of what there is for each head
    return tuple(Axis(OUT if i == channel else FIXED, (n,)) for i, n in enumerate(shape))


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


def _joined(modules: Mapping[str, nn.Module]) -> dict[str, Axes]:
    """Where two or four things of one width stand behind each other: gated units, and neighbours that Swin merges."""
    found: dict[str, Axes] = {}
    for name, module in modules.items():
        first, second = (getattr(module, n, None) for n in ("fc1", "fc2"))
        linear = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        if linear and first.out_features == 2 * second.in_features:
            found |= _linear(f"{name}.fc1", first, out=Axis(OUT, (2, second.in_features)))
        merging, dim = getattr(module, "reduction", None), getattr(module, "dim", None)
        if isinstance(merging, nn.Linear) and isinstance(dim, int) and merging.in_features == 4 * dim:
            found |= _linear(f"{name}.reduction", merging, into=Axis(IN, (4, dim)))
            found |= {
                f"{name}.norm.{n}": (Axis(OUT, (4, dim)),)
                for n, t in own_parameters(module.get_submodule("norm")).items()
                if tuple(t.shape) == (4 * dim,)
            }
    return found


def _linear(name: str, module: nn.Module, out: Axis | None = None, into: Axis | None = None) -> dict[str, Axes]:
    """The axes of a linear layer or a 1x1 convolution, one of which is known better than by its size."""
    shape = tuple(own_parameters(module)["weight"].shape)
    rest = tuple(Axis(KERNEL, (n,)) for n in shape[2:])
    weight = (out or Axis(OUT, shape[:1]), into or Axis(IN, shape[1:2]), *rest)
    return {f"{name}.{n}": weight if n == "weight" else weight[:1] for n in own_parameters(module)}


def _attentions(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, Axes]:
    """What goes by heads: projections to queries, keys and values, the one that leaves, and what lies on heads between them."""
    found: dict[str, Axes] = {}
    first: dict[type[nn.Module], bool] = {}
    for name, module in modules.items():
        heads = getattr(module, "num_heads", getattr(module, "heads", None))
        if not isinstance(heads, int):
            continue
        if hasattr(module, "key_dim") and hasattr(module, "value_dim"):
            found |= _shared_keys(name, module, heads)
            continue
        by_head = partial(_by_head, anatomy, heads, first, type(module))
        for last, child in module.named_children():
            found |= _projection(f"{name}.{last}", last, child, heads, by_head)
        width = next((a.parts[-1] for n, (a, *_) in found.items() if n.startswith(f"{name}.") and a.rigid), 0)
        norms = _inside(anatomy, name, module)
        found |= _between(name, module, norms, (heads, width))
    return found


def _by_head(anatomy: Anatomy, heads: int, known: dict[type[nn.Module], bool], kind: type[nn.Module], name: str) -> bool:
    """Whether a fused qkv's outputs stand head by head, told once for all attentions of a kind that have more than one."""
    if heads > 1 and kind not in known:
        known[kind] = not anatomy.value_last(name) and anatomy.value_last(name, heads)
    return known.get(kind, False)


def _projection(name: str, last: str, child: nn.Module, heads: int, by_head: Any) -> dict[str, Axes]:
    if not isinstance(child, nn.Linear | nn.Conv2d):
        return {}
    out, into = child.weight.shape[:2]
    fused = {"qkv": 3, "kv": 2}.get(last.removeprefix("to_"), 1 if last in HEADED else 0)
    if fused and out % (fused * heads) == 0:
        width = out // (fused * heads)
        turned = fused == 3 and by_head(name)
        parts = (heads, fused, width) if turned else (fused, heads, width) if fused > 1 else (heads, width)
        return _linear(name, child, out=Axis(OUT, parts, rigid=True, turned=turned))
    if last in LEAVING and into % heads == 0:
        return _linear(name, child, into=Axis(IN, (heads, into // heads), rigid=True))
    return {}


def _inside(anatomy: Anatomy, name: str, module: nn.Module) -> list[str]:
    """The norms that run on what goes by heads: behind the projections to it, before the one that leaves."""
    order = {n.removeprefix(f"{name}."): i for i, n in enumerate(anatomy.seen)}
    fused = HEADED | {"qkv", "kv", "to_qkv", "to_kv"}
    start = max((order[n] for n in fused if n in order), default=-1)
    stop = min((order[n] for n in LEAVING if n in order), default=len(anatomy.seen))
    return [n for n, _ in module.named_children() if "norm" in n and start < order.get(n, -1) < stop]


def _between(name: str, module: nn.Module, norms: Iterable[str], parts: tuple[int, int]) -> dict[str, Axes]:
    """What lies on all heads together: these norms, and biases of queries and values that stand apart."""
    owners = {name: module} | {f"{name}.{n}": module.get_submodule(n) for n in norms}
    size = (parts[0] * parts[1],)
    tensors = {f"{o}.{n}": t for o, m in owners.items() for n, t in own_parameters(m).items()}
    return {n: (Axis(OUT, parts, rigid=True),) for n, t in tensors.items() if tuple(t.shape) == size}


def _shared_keys(name: str, module: nn.Module, heads: int) -> dict[str, Axes]:
    """Attention of many queries to one key and value (MobileNetV4's)."""
    found: dict[str, Axes] = {}
    for last, width in (("query", module.key_dim), ("output", module.value_dim)):
        inside: Any = getattr(getattr(module, last, None), "proj", None)
        if isinstance(inside, nn.Conv2d) and isinstance(width, int):
            axis = Axis(OUT if last == "query" else IN, (heads, width), rigid=True)
            side = {"out": axis} if last == "query" else {"into": axis}
            found |= _linear(f"{name}.{last}.proj", inside, **side)
    return found

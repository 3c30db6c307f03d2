"""What one dimension of a tensor is, and what a network's structure says of it: heads, halves of gated units, neighbours that are merged."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from vtzoo.anatomy import Anatomy
from vtzoo.graft import own_parameters

OUT, IN, FIXED = "out", "in", "fixed"
KERNEL, PATCH, PIXELS = "kernel", "patch", "pixels"
PLACES, OFFSETS, CLASSES = "places", "offsets", "classes"
HEADED = {"q", "k", "v", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v", "query", "key", "value"}
LEAVING = {"proj", "out_proj", "to_out", "output"}
FUSED = {"qkv": 3, "to_qkv": 3, "kv": 2, "to_kv": 2}


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
        return math.prod(self.parts)


Axes = tuple[Axis, ...]


def joined(modules: Mapping[str, nn.Module]) -> dict[str, Axes]:
    """Where two or four things of one width stand behind each other: gated units, and neighbours that Swin merges."""
    found: dict[str, Axes] = {}
    for name, module in modules.items():
        first, second = (getattr(module, n, None) for n in ("fc1", "fc2"))
        halves = second.in_features if isinstance(second, nn.Linear) else 0
        if isinstance(first, nn.Linear) and first.out_features == 2 * halves:
            found |= _linear(f"{name}.fc1", first, out=Axis(OUT, (2, halves)))
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


def attentions(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, Axes]:
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


def _by_head(
    anatomy: Anatomy, heads: int, known: dict[type[nn.Module], bool], kind: type[nn.Module], name: str
) -> bool:
    """Whether a fused qkv's outputs stand head by head, told once for all attentions of a kind that have more than one."""
    if heads > 1 and kind not in known:
        known[kind] = not anatomy.value_last(name) and anatomy.value_last(name, heads)
    return known.get(kind, False)


def _projection(name: str, last: str, child: nn.Module, heads: int, by_head: Callable[[str], bool]) -> dict[str, Axes]:
    if not isinstance(child, nn.Linear | nn.Conv2d):
        return {}
    out, into = child.weight.shape[:2]
    fused = FUSED.get(last, 1 if last in HEADED else 0)
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
    start = max((order[n] for n in {*HEADED, *FUSED} if n in order), default=-1)
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

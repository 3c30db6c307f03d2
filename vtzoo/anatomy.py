"""Where a method can act: the sites of a backbone, found by module structure and one forward probe.

Duck-typed: nothing of timm is imported; what is used of a model is `get_classifier`, `num_prefix_tokens` and
`pretrained_cfg` where they exist.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vtzoo.classifier import head_names
from vtzoo.errors import UsageError, did_you_mean
from vtzoo.graft import CONTAINERS, Graft, named_bare, own_parameters
from vtzoo.probing import evaluating, probe
from vtzoo.spec import plain

QKV = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v", "to_qkv", "in_proj"}
NUMBERED = re.compile(r"b?\d+")
POSITION = re.compile(r"\.(cpb_mlp|meta_mlp|rel_pos\.mlp)(\.|$)")  # Swin V2's, its two authors', and MaxViT's and ViT's


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place in a backbone, with the geometry that fold needs.

    Attributes:
        name: full module name, "" for the root.
        kind: linear, conv, norm, module, or params (a bag of parameters of one module).
        shape: of the weight: [out, in], [out, in/groups, kh, kw], [channels]; of the output for a module.
        bias: the module has one.
        called: its forward runs; otherwise only its parameters are read.
        facts: anything else a method wants at fold time; plain JSON.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    bias: bool = False
    called: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Site":
        """From a header's JSON."""
        facts: dict[str, Any] = {**data, "shape": tuple(data.get("shape", ()))}
        return cls(**facts)

    def json(self) -> dict[str, Any]:
        """Plain JSON; defaults left out."""
        facts = {f.name: (f.default, getattr(self, f.name)) for f in fields(self)}
        return plain({k: v for k, (usual, v) in facts.items() if v not in (usual, {})})

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def key(self, param: str) -> str:
        """The full name of one of its parameters."""
        return f"{self.name}.{param}" if self.name else param


@dataclass(frozen=True, slots=True)
class Seen:
    """What the probe saw of one module: how often it was called, and the shapes of its input and output."""

    calls: int
    x: tuple[int, ...]
    y: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """The sites of one model, resolved before any graft; `batches` are labelled images, where the caller has some.

    Of a dual encoder they are its image tower's; `text` has those of the text tower.
    """

    model: nn.Module
    seen: Mapping[str, Seen]
    head: tuple[str, ...]
    rate: Callable[[], Mapping[str, Tensor]] | None = None
    batches: Iterable[tuple[Tensor, Tensor]] | None = None
    tower: str = ""

    @cached_property
    def text(self) -> "Anatomy":
        """The same of the text tower."""
        return replace(self, tower="text")

    @cached_property
    def scores(self) -> Mapping[str, Tensor]:
        """How sensitive the loss is to each entry of each parameter, by full name; see `vtzoo.sensitivity`.

        Raises:
            UsageError: there are no images to tell by.
        """
        if self.rate is None:
            raise UsageError(
                "this method chooses by gradients, and there are no images to take them on",
                "vtzoo.inject(model, spec, batches=[(images, labels), …]); vtzoo train hands over its own",
            )
        return self.rate()

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the tower outside the head, by name."""
        others: Any = getattr(self.model, "others", ())
        inside = tuple(f"{n}." for n in (*self.head, *others) if n != self.tower)
        own = {n: m for n, m in self.model.named_modules() if not f"{n}.".startswith(inside)}
        return {n: m for n, m in own.items() if f"{n}.".startswith(f"{self.tower}.")} if self.tower else own

    @cached_property
    def linears(self) -> list[Site]:
        """Every linear layer, and whether it is called or read."""
        return [self._linear(n, m) for n, m in self.modules.items() if isinstance(m, nn.Linear)]

    @cached_property
    def convs(self) -> list[Site]:
        """Every 2-d convolution."""
        return [self._conv(n, m) for n, m in self.modules.items() if isinstance(m, nn.Conv2d)]

    @cached_property
    def norms(self) -> list[Site]:
        """Every normalisation with an affine weight (BatchNorm, LayerNorm, GroupNorm, RMSNorm, with or without act)."""
        return [self._norm(n, m) for n, m in self.modules.items() if is_norm(m)]

    @cached_property
    def blocks(self) -> list[Site]:
        """The repeated units in order: numbered, called once, not nested, shape-keeping or not."""
        found: list[Site] = []
        for name, seen in self.seen.items():
            module = self.modules.get(name)
            if (
                module is None
                or not seen.x
                or not seen.y
                or isinstance(module, CONTAINERS)
                or not any(n not in module.__dict__.get("_graft_names", ()) for n, _ in module.named_children())
            ):
                continue
            parent, _, last = name.rpartition(".")
            row = [n for n, _ in self.model.get_submodule(parent).named_children()]  # RegNet's are b1, b2, … in a stage
            if not NUMBERED.fullmatch(last) or not all(NUMBERED.fullmatch(n) for n in row):
                continue
            found.append(self.module(name))
        inner = [s for s in found if not any(o.name.startswith(s.name + ".") for o in found)]
        order = {n: i for i, n in enumerate(self.modules)}
        return sorted(inner, key=lambda s: order[s.name])

    @cached_property
    def kind(self) -> str:
        """What it works on: "tokens" where there is attention or blocks see [batch, tokens, width], else "maps"."""
        attends = any({"attention", "qkv"} & self.roles(s) for s in self.linears)
        flat = any(len(self.seen[b.name].x) == 3 for b in self.blocks)
        return "tokens" if attends or flat else "maps"

    @cached_property
    def prefix(self) -> int:
        """How many tokens stand before the patches (class, registers); 0 for maps."""
        return int(getattr(self.model, "num_prefix_tokens", 0))

    @cached_property
    def stem(self) -> str:
        """The first leaf that sees the pixels, whatever hangs on it."""
        maps = (n for n, s in self.seen.items() if n in self.modules and len(s.x) == 4)
        name = next((n for n in maps if all(isinstance(m, Graft) for m in self.modules[n].children())), "")
        if not name:
            raise UsageError("no layer takes the image directly", "this method does not fit this backbone")
        return name

    def module(self, name: str, **facts: Any) -> Site:
        """A called module as a site; facts: channel axis, input and output shapes without the batch."""
        seen = self.seen[name]
        return Site(name=name, kind="module", shape=seen.y[1:], facts={"x": list(seen.x[1:]), **facts})

    def within(self, block: str, *names: str) -> str | None:
        """The first child of a block with one of these names that was called."""
        return next((f"{block}.{n}" for n in names if f"{block}.{n}" in self.seen), None)

    def channel_axis(self, name: str) -> int:
        """The axis of a called module's output that holds its channels: 1 (NCHW, token mixers' [B, C, N]) or -1.

        Told by the first layer inside, since a map's shape alone is ambiguous where channels, height and width agree.
        """
        if len(self.seen[name].y) != 4:
            return 1 if "tokens" in name.rpartition(".")[2] else -1
        inside = (self.modules[n] for n in self.seen if n in self.modules and (n == name or n.startswith(f"{name}.")))
        first = next((m for m in inside if "weight" in own_parameters(m)), None)
        last = hasattr(first, "normalized_shape") and "2d" not in type(first).__name__
        return -1 if last or isinstance(first, nn.Linear) else 1

    @torch.no_grad()
    def value_last(self, name: str, heads: int = 1) -> bool:
        """Whether the last third of a fused qkv's outputs, of each head's where they go by head, is the value.

        Told by what the attention does, whose output is linear in its values: doubling that third of weight and bias
        must double what comes out, less the constant that comes out when it is zero. Where queries or keys are among
        them it does not.
        """
        above, _, last = name.rpartition(".")
        shape = self.seen[above].x if above in self.seen else ()
        own = own_parameters(self.model.get_submodule(name))
        if not shape or "weight" not in own:
            return False
        parent = self.model.get_submodule(above)
        which = own["weight"].new_zeros(heads, 3, own["weight"].shape[0] // (3 * heads))
        which[:, 2] = 1
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(own["weight"])

        def output(scale: float) -> Tensor:
            rows = (1 + (scale - 1) * which).flatten()
            changed = {f"{last}.{n}": p * rows.reshape(-1, *[1] * (p.ndim - 1)) for n, p in own.items()}
            return functional_call(parent, changed, (x,))

        try:
            with evaluating(parent):
                zero, once, twice = (output(scale) for scale in (0, 1, 2))
        except (TypeError, RuntimeError, ValueError):  # it wants more than its input
            return False
        moved = once - zero
        largest = float(moved.abs().max())
        return largest > 0 and torch.allclose(twice - zero, 2 * moved, rtol=1e-3, atol=1e-4 * largest)

    def params(self, wanted: Iterable[str]) -> list[Site]:
        """Parameters by full name, gathered by the module that owns them."""
        names, sites = set(wanted) & set(self.parameter_names), list[Site]()
        for name, module in self.modules.items():
            own = {p: tuple(t.shape) for p, t in own_parameters(module).items() if _full(name, p) in names}
            if own:
                sites.append(Site(name=name, kind="params", facts={"params": {k: list(v) for k, v in own.items()}}))
        return sites

    @cached_property
    def parameter_names(self) -> list[str]:
        """Every parameter outside the head."""
        others: Any = getattr(self.model, "others", ())
        found = [_full(n, p) for n, m in self.modules.items() for p in own_parameters(m)]
        return [n for n in found if n not in others]

    def select(self, targets: Sequence[str], sites: Iterable[Site] | None = None) -> list[Site]:
        """The sites that any target names: a role, a name or its last part, or a glob over full names.

        Roles: auto (the blocks' linears; without any, their dense convolutions; without blocks, all past the stem), linear, conv,
        norm, attention, mlp, qkv, pointwise, depthwise, spatial, blocks, downsample; what computes relative positions in an attention
        has the role position, and beside it blocks and its kind. In a dual encoder's text tower they start with "text.".

        Raises:
            UsageError: a target names nothing here.
        """
        said = [t for t in targets if t.startswith("text.")]
        if said and sites is None and not self.tower and getattr(self.model, "text", None) is not None:
            rest = [t for t in targets if t not in said]
            return [*(self.select(rest) if rest else ()), *self.text.select(said)]
        pool = [*self.linears, *self.convs] if sites is None else list(sites)
        chosen: dict[str, Site] = {}
        for target in targets:
            hits = [s for s in pool if self._is(s, target)]
            if not hits:
                words = {s.last for s in pool} | {r for s in pool for r in self.roles(s)}
                raise UsageError(
                    f"target '{target}' names nothing in this backbone that this method acts on",
                    did_you_mean(target, words),
                )
            chosen.update({s.name: s for s in hits})
        return [s for s in pool if s.name in chosen]

    def roles(self, site: Site) -> set[str]:
        """The words by which a site can be targeted beside its name."""
        parent = site.name.rpartition(".")[0].rpartition(".")[2]
        found = {site.kind}
        found |= {"blocks"} if any(site.name.startswith(b.name + ".") for b in self.blocks) else set()
        if POSITION.search(site.name):
            return found | {"position"}
        found |= {"attention"} if "attn" in parent or "attention" in parent else set()
        found |= {"mlp"} if "mlp" in parent or site.last in ("fc1", "fc2", "fc1_g", "fc1_x") else set()
        found |= {"qkv"} if site.last in QKV else set()
        found |= {"downsample"} if "downsample" in site.name else set()
        if site.kind == "conv":
            groups, (out, _, *kernel) = site.facts["groups"], site.shape
            depthwise = groups > 1 and groups == out
            found.add("depthwise" if depthwise else "pointwise" if set(kernel) == {1} else "spatial")
        return found

    def _is(self, site: Site, target: str) -> bool:
        if self.tower and target.startswith(f"{self.tower}.") and "*" not in target and target != site.name:
            target = target.removeprefix(f"{self.tower}.")
        if target == "auto":
            roles, near = self.roles(site), self._near
            dense = "linear" if any(near(s) for s in self.linears) else "conv"
            return near(site) and dense in roles and "depthwise" not in roles
        named = target in (site.last, site.name) or ("*" in target and fnmatchcase(site.name, target))
        return named or target in self.roles(site)

    def _near(self, site: Site) -> bool:
        """In a block; on a backbone whose blocks aren't numbered (RegNet), anywhere past the stem."""
        roles = self.roles(site)
        return "position" not in roles and ("blocks" in roles if self.blocks else site.name != self.stem)

    def _linear(self, name: str, m: nn.Linear) -> Site:
        fused = {"fused": 3} if name.endswith("qkv") and m.out_features % 3 == 0 else {}
        return Site(
            name=name,
            kind="linear",
            shape=(m.out_features, m.in_features),
            bias=m.bias is not None,
            called=name in self.seen,
            facts=fused,
        )

    def _conv(self, name: str, m: nn.Conv2d) -> Site:
        facts = {"groups": m.groups, "stride": list(m.stride), "padding": plain(m.padding), "type": type(m).__name__}
        if "StdConv" in type(m).__name__:  # the weight is standardised as it is read, so its scale has no effect
            facts["standardised"] = "gain" if "gain" in own_parameters(m) else "bare"
        return Site(
            name=name,
            kind="conv",
            shape=tuple(m.weight.shape),
            bias=m.bias is not None,
            called=name in self.seen,
            facts=facts,
        )

    def _norm(self, name: str, m: nn.Module) -> Site:
        own = own_parameters(m)
        return Site(
            name=name,
            kind="norm",
            shape=tuple(own["weight"].shape),
            bias="bias" in own,
            called=name in self.seen,
            facts={"type": type(m).__name__},
        )


def is_norm(module: nn.Module) -> bool:
    """A leaf that normalises, then scales by a one-dimensional weight (so not ConvNeXt V2's response norm)."""
    weight, kind = module._parameters.get("weight"), type(module).__name__.lower()
    return weight is not None and weight.ndim == 1 and "norm" in kind and "response" not in kind


def survey(
    model: nn.Module,
    size: tuple[int, int, int] | None = None,
    rate: Callable[[], Mapping[str, Tensor]] | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Anatomy:
    """Run one image through the model and note which modules, none of grafts, are called, in order, with which shapes.

    Args:
        model: in any mode, which it keeps.
        size: of the image in pixels [channels, height, width].
        rate: gives the scores of every parameter, should a method ask.
        batches: labelled images [n, 3, h, w] and labels [n], for methods that choose by activations.
    """
    seen: dict[str, Seen] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            calls = seen[name].calls + 1 if name in seen else 1
            seen[name] = Seen(calls, _shape(x), _shape(y))

        return hook

    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in named_bare(model)]
    try:
        probe(model, size)
    finally:
        for handle in handles:
            handle.remove()
    return Anatomy(model, {n: seen[n] for n in seen if n}, head_names(model), rate, batches)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _full(module: str, param: str) -> str:
    return f"{module}.{param}" if module else param

"""What a delta would cost before it is trained: parameters, memory while training, a file's size.

    memory = 4 B + 16 T + C + n A   bytes, in float32

B numbers of the backbone, T trained ones (value, gradient and AdamW's two moments), A what one image's forward pass keeps
for the backward one, C what it keeps however many images there are (weights made anew in each step), n images a batch.
A and C are measured by torch's hooks on saved tensors, with one image and with two. What a backward pass needs for a
moment, and the loader, come on top.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry
from vtzoo.anatomy import Anatomy
from vtzoo.classifier import head_names
from vtzoo.delta import Part, is_linear
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.files import safetensors_header
from vtzoo.fingerprint import base_state
from vtzoo.folding import Folded, fold_part, reason
from vtzoo.installed import head_state
from vtzoo.lean import counting
from vtzoo.live import trainable
from vtzoo.methods._protocol import composes, prepares
from vtzoo.methods._protocol import head as build_head
from vtzoo.rebuilt import rebuild, rebuild_shared
from vtzoo.spec import plain
from vtzoo.tensors import CODES

NUMBER, TRAINED = 4, 16  # bytes of a number, and of one that is trained


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A method on a backbone with its grafts on the meta device: shapes without values.

    Attributes:
        tensors: what a file would hold, under its names there; the head left out.
        params: trained numbers, those of a plain linear head left out.
        head: the head's tensors.
    """

    part: Part
    tensors: Mapping[str, Tensor]
    params: int
    head: Mapping[str, Tensor]

    @property
    def file_bytes(self) -> int:
        """Size of the delta's file in float32; its metrics and lineage, some hundred bytes, left out."""
        named = {**self.tensors, **{f"@head/task/{n}": t for n, t in self.head.items()}}
        stored = {n: t.float() if t.is_floating_point() else t for n, t in named.items()}
        about = {"vtzoo": json.dumps(plain(self.part.json()))}
        header = safetensors_header([(n, CODES[t.dtype], t.shape) for n, t in stored.items()], about)
        return len(header) + sum(t.numel() * t.element_size() for t in stored.values())


def planned(anatomy: Anatomy, name: str, values: Mapping[str, Any]) -> Planned:
    """Resolve a method's sites and build its grafts without values.

    Raises:
        UsageError: it does not fit this backbone, or not with these knobs.
    """
    module = registry.load("methods", name)
    if composes(module):
        raise UsageError(
            f"{name} finds a stack of other methods by training on labelled images, so its cost can't be told beforehand",
            f"set its own budget: vtzoo train --method {name}[budget=0.1M]",
        )
    if prepares(module):
        raise UsageError(
            f"{name} keeps the features of every training image, so its cost can't be told beforehand",
            f"see what it takes: vtzoo train --method {name} --dry-run",
        )
    config = knobs.decode(module.Config, values, name)
    sites = tuple(module.sites(anatomy, config))
    part = Part(method=name, graft=name.replace("-", "_"), knobs=knobs.encode(config), sites=sites)
    grafts = {s.key(part.graft): rebuild(module, s, config) for s in sites}
    if (shared := rebuild_shared(part)(None)) is not None:
        grafts[part.graft] = shared
    tensors = {f"{key}.{n}": t for key, g in grafts.items() for n, t in g.pack().items()}
    head, more = _head(anatomy.model, module, config)
    params = more + sum(p.numel() for g in grafts.values() for p in g.parameters())
    return Planned(part=part, tensors=tensors, params=params, head=head)


def folds(plan: Planned, model: nn.Module) -> tuple[bool, str]:
    """Whether a plan folds into this backbone; if not, why."""
    own = hasattr(plan.part.module, "head") and not hasattr(plan.part.module, "fold_head")
    if own and not is_linear(plan.head):
        return False, reason(plan.part.method)
    base = base_state(model)
    try:
        fold_part(Folded(base), plan.tensors, plan.part, base)
    except NotFoldable as refusal:
        return False, str(refusal).removeprefix(f"{plan.part.method}: ")
    return True, ""


def memory_bytes(model: nn.Module, size: tuple[int, int, int], batch_size: int) -> int:
    """What training a model that carries a fresh delta keeps in memory; see the module's docstring."""
    numbers = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() for p in trainable(model).values())
    one, two = (_kept(model, size, count) for count in (1, 2))
    return NUMBER * (numbers - trained) + TRAINED * trained + max(0, 2 * one - two) + batch_size * (two - one)


def _kept(model: nn.Module, size: tuple[int, int, int], count: int) -> int:
    """Bytes that a forward pass in training mode keeps, each storage counted once and the model's own not at all."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}  # noqa: SLF001 - a storage's identity
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # noqa: SLF001 - as above
            kept[storage._cdata] = storage  # noqa: SLF001 - as above; held, so that none takes another's place
        return tensor

    like = next(model.parameters())
    with torch.enable_grad(), counting(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.zeros(count, *size, device=like.device, dtype=like.dtype))
    return sum(s.nbytes() for s in kept.values())


def _head(model: nn.Module, module: Any, config: Any) -> tuple[dict[str, Tensor], int]:
    """The head's tensors, and how many numbers more they are than a plain linear head's."""
    before, after = head_state(model), dict[str, Tensor]()
    for name in head_names(model):
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = build_head(module, old, config) if isinstance(old, nn.Linear) else None
        after.update({f"{name}.{n}": t for n, t in (new or old).state_dict(keep_vars=True).items()})
    return after, sum(t.numel() for t in after.values()) - sum(t.numel() for t in before.values())

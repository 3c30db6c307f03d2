"""Put a delta on a live model and take it off: inject (fresh), attach (saved), extract, detach.

All four are method-blind: a method names its sites and builds one graft per site; everything else stands here once.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry
from vtzoo.anatomy import Anatomy, survey
from vtzoo.classifier import head_names
from vtzoo.delta import BASE, HEAD, Delta, Part
from vtzoo.errors import Conflict, DeadTarget, UsageError
from vtzoo.fingerprint import base_state
from vtzoo.gathering import gathered
from vtzoo.graft import (
    Shared,
    freeze_statistics,
    graft,
    has_statistics,
    hosts,
    named_grafts,
    prune,
    tensors_of,
    watching,
)
from vtzoo.identity import RESIZED, card_on, check_backbone, check_places
from vtzoo.installed import INSTALLED, Installed, head_state, installed, set_head, swap_heads
from vtzoo.limits import free, limit
from vtzoo.masks import of_task
from vtzoo.methods._protocol import composes, learns, prepares
from vtzoo.probing import forget, probe
from vtzoo.sensitivity import Batches, scores
from vtzoo.spec import BackboneCard, Task, check_labels
from vtzoo.speech import heard
from vtzoo.tensors import fill, whole
from vtzoo.text_head import Spoken
from vtzoo.tied import aliases, tied

if TYPE_CHECKING:
    from pathlib import Path


def inject(model: nn.Module, spec: str, *, seed: int = 0, batches: Batches | None = None) -> nn.Module:
    """Hang a fresh trainable delta on a model, in place.

    Afterwards exactly the delta's and the head's parameters require gradients, and BatchNorm statistics stay frozen
    in training mode.

    Args:
        model: a timm model; its classifier becomes the delta's head (build it with `num_classes=N`).
        spec: for example "lora[rank=8]+bitfit"; sites are resolved on the bare backbone. A part that composes (noah) gives way to
            the stack it finds, and the delta is that stack's.
        seed: of the fresh values.
        batches: images [n, 3, h, w] as the model takes them, and labels [n]; read once, by methods that choose by gradients
            (gps, spt), by training (noah), or keep the features of all images (tip-adapter) alone; in a stack by each of these.

    Returns:
        The same model.

    Raises:
        UsageError: unknown knobs or targets, two heads, nothing that could be trained, or batches are wanted.
        NotFound: unknown method.
        Conflict: the model carries a delta already.
        DeadTarget: a site is neither called nor read.
    """
    _refuse_second(model)
    spec, batches = _composed(model, spec, seed, batches)
    wanted = [_configured(p) for p in knobs.parse(spec)]
    _one_head(model, wanted)
    _prompts_in_order(wanted)
    anatomy = survey(model, rate=None if batches is None else lambda: scores(model, batches), batches=batches)
    parts, shared = list[Part](), aliases(model)
    for name, module, config in wanted:
        sites = tied(module.sites(anatomy, config), shared)
        if not sites and learns(module) and not hasattr(module, "head"):
            raise UsageError(
                f"{name} has found no place to act in this {type(model).__name__}", "name layers in targets=…"
            )
        parts.append(Part(method=name, graft=_attribute(name, parts), knobs=knobs.encode(config), sites=sites))
    record, swapped = _begin(model, spec), dict[str, Sequence[str]]()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part, (_, module, config) in zip(parts, wanted, strict=True):
                _hang(model, part, module, config, anatomy)
                swapped[part.graft] = swap_heads(model, record, module, config)
            for part, (_, module, config) in zip(parts, wanted, strict=True):
                if prepares(module):
                    _prepare(model, part, config, swapped[part.graft], batches)
        record.parts.extend(parts)
        limit(model, parts, anatomy)
        _alive(model, anatomy)
        _trainable(model, spec, [module for _, module, _ in wanted])
    except BaseException:
        detach(model)
        raise
    return model


def attach(model: nn.Module, delta: "Delta | str | Path", *, task: str | None = None, check: bool = True) -> nn.Module:
    """Put a saved delta on a model, in place, with the head of one task.

    Args:
        model: the backbone it was trained on, at the same input size (`vtzoo.build` of the delta's own facts).
        delta: what `Delta.open` gives, or the file's path.
        task: whose head; may be left out where there is one task, or "" for no head.
        check: compare fingerprints first.

    Of a dual encoder without its text tower it takes what acts on the image tower, and the classifier that the texts made.

    Raises:
        WrongBackbone: other weights.
        ShapeMismatch: another depth, width or input size.
        DeadTarget: a site is neither called nor read in this version of the model.
        UsageError: each task has a network of its own, and none is named.
    """
    _refuse_second(model)
    delta = delta if isinstance(delta, Delta) else Delta.open(delta)
    if check:
        check_backbone(model, delta)
    delta = heard(model, of_task(delta, base_state(model), task), headless=task == "")
    anatomy = survey(model)
    check_places(model, delta, anatomy)
    record = _begin(model, delta.method)
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # what is drawn is overwritten; the caller's random numbers stay in step
            for part in delta.parts:
                _hang(model, part, part.module, part.config)
            record.parts.extend(delta.parts)
            limit(model, delta.parts, anatomy)
            fill(tensors_of(model), _unpacked(model, {n: t for n, t in delta.tensors.items() if n[0] != "@"}))
            if task != "" and delta.tasks:
                set_head(model, delta, delta.task(task).name)
        _alive(model, anatomy)
    except BaseException:
        detach(model)
        raise
    return model.eval()


def extract(
    model: nn.Module,
    *,
    task: str = "task",
    classes: Sequence[str] = (),
    tasks: Sequence[Task] | None = None,
    backbone: BackboneCard | None = None,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Delta:
    """The trainable part of a model as an artifact, with what `build` resized for its input size; tensors are copied to the CPU.

    Args:
        model: one that `inject` or `attach` prepared.
        task: what to call the task whose head the model carries.
        classes: its labels in the order of the head's outputs; what a text tower calls them, or "0", "1", … unless given.
        tasks: the same two and the preprocessing as one record; () leaves the head out.
        backbone: facts of the backbone; by default those that `build` left on the model.
        metrics: what was measured.
        recipe: how it was trained.
        lineage: what it was made from.

    Raises:
        UsageError: the model carries no delta, or the labels are not as many as the head's outputs, or one stands twice.
    """
    record = installed(model)
    if record is None:
        raise UsageError("this model carries no delta", "call vtzoo.inject(model, 'lora') first")
    tensors = {p + n: _copy(t) for p, child in named_grafts(model) for n, t in child.pack().items()}
    card = backbone or card_on(model)
    if tasks is None:
        tasks = _own_task(model, task, classes, card)
    for one in tasks:
        check_labels(one.classes)
        tensors.update({f"{HEAD}{one.name}/{n}": _copy(t) for n, t in head_state(model).items()})
    tensors.update({BASE + n: _copy(t) for n, t in base_state(model).items() if n in model.__dict__.get(RESIZED, ())})
    return Delta(
        method=record.spec, parts=tuple(record.parts), backbone=card, tensors=tensors, tasks=tuple(tasks),
        metrics=metrics or {}, recipe=recipe or {}, lineage=lineage or {},
    )  # fmt: skip


def detach(model: nn.Module) -> nn.Module:
    """Take the delta off; the backbone, its classes and `requires_grad` flags are again what they were, bit for bit."""
    record = model.__dict__.pop(INSTALLED, None)
    if record is None:
        return model
    free(model)
    for _, host in hosts(model):
        prune(host)
    for name, module in model.named_modules():
        if module.__dict__.get("_frozen_statistics"):
            freeze_statistics(module, frozen=False)
            module.training = name in record.training_before
    for name, head in record.heads_before.items():
        model.set_submodule(name, head)
    if record.classes_before is not None:
        model.num_classes = record.classes_before  # type: ignore[assignment] - a plain attribute of timm models
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trainable_before.get(name, True))
    forget(model)
    return model


def _own_task(model: nn.Module, name: str, classes: Sequence[str], card: BackboneCard) -> tuple[Task, ...]:
    """The task of the model's own head; none where it has no head."""
    if not head_state(model):
        return ()
    count = int(getattr(model, "num_classes", 0)) or len(classes)
    if classes and len(classes) != count:
        raise UsageError(f"{len(classes)} classes for a head of {count} outputs", "name each output once, in order")
    head: Any = next((m for m in map(model.get_submodule, head_names(model)) if isinstance(m, Spoken)), None)
    said = {} if head is None else {"words": head.words, "templates": head.templates}
    labels = tuple(classes) or (head.words if head else tuple(map(str, range(count))))
    return (Task(name=name, classes=labels, preprocess=card.preprocess, **said),)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _configured(part: knobs.Part) -> tuple[str, Any, Any]:
    module = registry.load("methods", part.name)
    config = knobs.decode(module.Config, part.knobs, part.name)
    if getattr(config, "targets", None) == ():
        raise UsageError(f"{part.name}: targets is empty", "name roles or layers, or leave targets out")
    return part.name, module, config


def _composed(model: nn.Module, spec: str, seed: int, batches: Batches | None) -> tuple[str, Batches | None]:
    """Each part that composes replaced by the stack it finds, and the batches, to be read again."""
    parts = knobs.parse(spec)
    wanted = [_configured(p) for p in parts]
    if not any(composes(module) for _, module, _ in wanted):
        return spec, batches
    with torch.random.fork_rng(devices=[]):  # loaders draw a seed
        kept = None if batches is None else list(batches)
        found = [
            module.compose(model, config, kept, seed) if composes(module) else str(part)
            for part, (_, module, config) in zip(parts, wanted, strict=True)
        ]
    return "+".join(found), kept


def _one_head(model: nn.Module, wanted: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuse a stack in which two methods would build the one head."""
    building = [name for name, module, _ in wanted if hasattr(module, "head")]
    if len(building) > 1:
        raise UsageError(
            f"{' and '.join(building)} would both build the head of this {type(model).__name__}", "name one"
        )


def _prompts_in_order(wanted: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuse prompts beside the patches behind those of both towers, whose places they would take."""
    tokens = [
        (n, m.GROUP)
        for n, m, _ in wanted
        if m.GROUP.startswith("prompt/") and getattr(m, "FAMILIES", ()) == ("tokens",)
    ]
    both = next((i for i, (_, group) in enumerate(tokens) if group == "prompt/vision-language"), len(tokens))
    if later := tokens[both + 1 :]:
        name, other = tokens[both][0], later[0][0]
        raise UsageError(
            f"{other} would put its prompts in the places of {name}'s", f"write {name} last: {other}+{name}"
        )


def _attribute(method: str, before: Sequence[Part]) -> str:
    """The graft's attribute name: the method's, numbered when it stands more than once in a stack."""
    count = sum(p.method == method for p in before)
    return method.replace("-", "_") + (f"_{count + 1}" if count else "")


def _begin(model: nn.Module, spec: str) -> Installed:
    record = Installed(spec, [], {n: p.requires_grad for n, p in model.named_parameters()})
    record.training_before = {n for n, m in model.named_modules() if m.training}
    model.__dict__[INSTALLED] = record
    inside = tuple(h + "." for h in head_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(inside) and name.startswith(inside))
    for module in list(model.modules()):
        if has_statistics(module):
            freeze_statistics(module)
    return record


def _hang(model: nn.Module, part: Part, module: Any, config: Any, anatomy: Anatomy | None = None) -> None:
    """Build a part's grafts and hang them; fresh ones take their first values from the host."""
    shared: Shared | None = None
    if hasattr(module, "Shared"):
        like = next(model.parameters())
        made: Shared = module.Shared(part.sites, config).to(like.device, like.dtype)
        graft(model, part.graft, made.train(model.training))
        shared = made
    for site in part.sites:
        host = model.get_submodule(site.name)
        like = next(iter(host.parameters()), None)
        like = next(model.parameters()) if like is None else like
        child = module.Graft(site, config).to(like.device, like.dtype)
        if shared is not None:
            child.share(shared)
        if anatomy is not None:
            child.start(host, lambda name, site=site, anatomy=anatomy: anatomy.scores[site.key(name)])
        graft(host, part.graft, child.train(host.training))


def _alive(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a delta of which some graft never acts."""
    with watching() as seen:
        probe(model, None)
    dead = [
        n for n, host in hosts(model) if any(id(host._modules[g]) not in seen for g in host.__dict__["_graft_names"])
    ]
    if dead:
        called = [n for n in dead if n in anatomy.seen]
        raise DeadTarget(
            f"{len(dead)} sites of {type(model).__name__} are neither called nor read in a forward pass: {', '.join(dead[:3])}"
            + (" …" if len(dead) > 3 else "")
            + (f" ({len(called)} are called)" if called else ""),
            "leave them out of targets=…",
        )


def _prepare(model: nn.Module, part: Part, config: Any, heads: Sequence[str], batches: Batches | None) -> None:
    """Let a method make its classifiers of all images' features.

    Raises:
        UsageError: there is no classifier, there are no images, or these are of no one class that it knows.
    """
    if not heads:
        raise UsageError(f"{part.method} makes a classifier, and this model has none", "build it with num_classes=N")
    if batches is None:
        raise UsageError(f"{part.method} keeps features of the training images", "give them: inject(…, batches=…)")
    features, labels = gathered(model, heads, batches)
    if labels.ndim > 1:
        raise UsageError(f"{part.method} is for images of one class each, and an image here has several", "use linear")
    count = int(getattr(model, "num_classes", 0))
    if odd := [n for n in labels.tolist() if not 0 <= n < count]:
        raise UsageError(f"an image is of class {odd[0]}, and this model has {count}", "build it with num_classes=N")
    for head in heads:
        part.module.prepare(model.get_submodule(head), config, features[head], labels)


def _trainable(model: nn.Module, spec: str, methods: Sequence[Any]) -> None:
    """Refuse a fresh delta that has nothing to train, though its methods learn and were made of no images."""
    if not trainable(model) and any(learns(m) and not prepares(m) for m in methods):
        raise UsageError(f"'{spec}' trains only a head, and this model has none", "build it with num_classes=N")


@torch.no_grad()
def _unpacked(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as the grafts on the model want them; what belongs to none stays."""
    found: dict[str, Tensor] = {}
    for prefix, child in named_grafts(model):
        own = {n: tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        found |= {prefix + n: t for n, t in child.unpack({n[len(prefix) :]: t for n, t in own.items()}).items()}
    return found | tensors


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def _refuse_second(model: nn.Module) -> None:
    if installed(model) is not None:
        raise Conflict(
            "this model carries a delta already", "call vtzoo.detach(model) first, or stack methods with '+'"
        )

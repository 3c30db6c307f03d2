"""A training resolved: where the network is cut, what it is fed with, what is trained, and what that would take."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability as cpu_capability
from torch.nn import functional as F

from vtzoo import beside, own_loss, parallel, talk
from vtzoo import data as D
from vtzoo.classifier import head_names
from vtzoo.devices import accelerator, channels_last, computing
from vtzoo.errors import Resources, UsageError
from vtzoo.feed import LEAST, Feed, Forward, Place, fits, of_features, of_images, pays, size_bytes, views_of
from vtzoo.fit import Plan
from vtzoo.forecast import acting, forecast
from vtzoo.gathering import gathered
from vtzoo.graft import rates, undecayed
from vtzoo.identity import CARD
from vtzoo.installed import head_state, installed
from vtzoo.layerwise import shares
from vtzoo.prefix import Prefix, find, share
from vtzoo.probes import stepper
from vtzoo.recipe import Recipe, facts_of
from vtzoo.results import leading
from vtzoo.score import logits_of, measure
from vtzoo.spec import BackboneCard, Task, plain
from vtzoo.zoo import Zoo

ENOUGH = 0.5
"""Which part of the work must be saved where so much is kept for it as what a side network leans on."""


@dataclass(frozen=True)
class Job:
    """Everything resolved, nothing trained yet; `asked` is the stack as it was given, `spec` what a part that composes made of it.

    `grid` has the learning rate and weight decay of each probe, where many are trained at once; `weights` is how much the images of
    each class count, [classes], where that differs.
    """

    zoo: Zoo
    name: str
    card: BackboneCard
    asked: str
    spec: str
    model: nn.Module
    recipe: Recipe
    task: Task
    train: D.Images
    val: D.Images
    test: D.Images | None
    grid: tuple[tuple[float, float], ...] = ()
    weights: Tensor | None = None


def mixes(recipe: Recipe) -> bool:
    """Whether images are mixed with each other."""
    return recipe.mixup > 0 or recipe.cutmix > 0


def cut(job: Job) -> Prefix | None:
    """Where the frozen layers end, if what they make of the images is worth keeping."""
    recipe, size = job.recipe, job.task.preprocess.input_size
    if job.grid:
        return _probed(job)
    if recipe.cache == "off" or recipe.parallel == "fsdp" or mixes(recipe) or not views_of(recipe).count:
        return None
    model = channels_last(job.model.to(accelerator(recipe).device))
    prefix = find(model, size, LEAST)
    if _may_lean(recipe, model) and (prefix is None or share(model, prefix) < ENOUGH):
        prefix = max(prefix, beside.find(model, size, ENOUGH), key=lambda p: share(model, p) if p else 0.0)
    epochs, images, views = recipe.probe_epochs + recipe.epochs, _counts(job), views_of(recipe)
    if prefix is None or not parallel.by_first(lambda: pays(job.model, prefix, views, epochs, images, _folder(job))):
        return None
    taken = f"{_size_bytes(job, prefix) / 2**20:,.0f} MiB of features"
    talk.say(f"{prefix.told} runs once for each of {views.count} views of an image: {taken}")
    return prefix


def _may_lean(recipe: Recipe, model: nn.Module) -> bool:
    """Whether what a side network leans on may be kept: on a processor, and where it is stored as it was computed."""
    plain = recipe.precision == "fp32" and not recipe.compile and not recipe.checkpointing
    return plain and next(model.parameters()).device.type == "cpu"


def _probed(job: Job) -> Prefix:
    """Where the features of many probes come from.

    Raises:
        UsageError: none are to be kept, each epoch would have its own, the head is none of one linear layer, or several processes
            would each train them.
        Resources: the disk has no room.
    """
    if parallel.count() > 1:
        raise UsageError("probes are trained together in one process", "start it without torchrun, or train one probe")
    if job.recipe.cache == "off":
        raise UsageError(
            "probes are trained together on kept features, and cache=off keeps none", "leave cache=off out"
        )
    if not views_of(job.recipe).count:
        raise UsageError("probes are trained together on kept features", "say how many: --set views=4, or augment=flip")
    prefix = find(channels_last(job.model.to(accelerator(job.recipe).device)), job.task.preprocess.input_size)
    if prefix is None or not prefix.last or not isinstance(job.model.get_submodule(prefix.cut), nn.Linear):
        raise UsageError(f"the head of {job.card.name} is no single linear layer", "train one probe: --method linear")
    if not fits(prefix, views_of(job.recipe), _counts(job), _folder(job)):
        size = _size_bytes(job, prefix)
        raise Resources(f"features of {size:,} bytes would fill the disk", "free some space, or use fewer views")
    return prefix


def head_of(model: nn.Module, prefix: Prefix) -> nn.Linear:
    """The classifier that a network is cut before."""
    head = model.get_submodule(prefix.cut)
    assert isinstance(head, nn.Linear)
    return head


def feed_of(job: Job, prefix: Prefix | None) -> Feed:
    """Images, or what a cut network's first part makes of them; computed here where it isn't kept already."""
    recipe, shape = job.recipe, job.task.preprocess
    if prefix is None:
        return of_images(job.train, job.val, shape, recipe, whole=mixes(recipe))
    made, used = accelerator(recipe), ("vtzoo", "torch", "torchvision", "timm", "pillow")
    card: BackboneCard = getattr(job.model, CARD)  # with the fingerprint of what was loaded
    facts: dict[str, Any] = {"backbone": card.fingerprint, "arch": card.arch, "model_args": plain(card.model_args)}
    facts |= {"precision": recipe.precision, "device": made.device.type, "cpu": cpu_capability()}
    facts |= {name: version(name) for name in used}
    return of_features(
        prefix,
        job.model,
        job.train,
        job.val,
        shape,
        recipe,
        Place(_folder(job), facts, lambda: computing(made), recipe.workers),
    )


def searched(job: Job) -> None:
    """Let methods choose by the validation images what they are asked to, once all is trained."""
    record, model = installed(job.model), job.model
    assert record is not None
    for part in record.parts:
        if not (hasattr(part.module, "tune") and part.config.search):
            continue
        names = [n for n in head_names(model) if model.get_submodule(n) is not record.heads_before.get(n)]
        plain = D.transforms(job.task.preprocess, train=False)
        features, labels = gathered(model, names, D.loader(job.val, plain, batch_size=job.recipe.batch_size))
        for name in names:
            part.module.tune(model.get_submodule(name), part.config, features[name], labels)


def forecast_of(job: Job, prefix: Prefix | None) -> dict[str, Any]:
    """What the training would take; it takes two steps of it."""
    feed, views = of_images(job.train, job.val, job.task.preprocess, job.recipe, whole=mixes(job.recipe)), 0
    record, kept = installed(job.model), None
    assert record is not None
    if prefix is not None:
        feed, views = replace(feed, run=prefix.rest), views_of(job.recipe).count
        kept = {"cut": prefix.cut, "views": views, "size_bytes": _size_bytes(job, prefix)}
    step = stepper(head_of(job.model, prefix), job.recipe, job.grid, job.weights) if job.grid and prefix else None
    found = forecast(plan_of(job, feed), feed, prefix, views, _counts(job)[1], step)
    return {**found, "images": len(job.train), "features": kept, "acts": acting(record.parts)}


def _size_bytes(job: Job, prefix: Prefix) -> int:
    return size_bytes(prefix, views_of(job.recipe), _counts(job))


def _counts(job: Job) -> tuple[int, int]:
    """Images that are trained on, and those that are looked at meanwhile."""
    return len(job.train), len(job.val) if job.recipe.validates else 0


def _folder(job: Job) -> Path:
    return job.zoo.root / ".vtzoo" / "features"


def plan_of(job: Job, feed: Feed, checkpoint: Path | None = None) -> Plan:
    """What is trained, and on what."""
    recipe, model = job.recipe, job.model
    facts = [
        job.name,
        job.asked,
        facts_of(recipe),
        job.card.name,
        getattr(job.model, CARD).fingerprint,
        job.train.digest,
        len(job.train),
    ]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def held_out(which: nn.Module) -> dict[str, float]:
        found = measure(*logits_of(which, feed.held_out(), feed.run, feed.held))
        return {**leading(found), "val_loss": found["loss"]}

    record = installed(model)
    assert record is not None
    return Plan(
        model=model, loss=own_loss.around(_loss_of(job, feed.run), model, record.parts), batches=feed.batches, steps=feed.steps,
        recipe=recipe, validate=held_out if recipe.validates else None, head=frozenset(n for n, t in head_state(model).items() if t.requires_grad), rates=rates(model),
        shares=shares(model, recipe.layer_decay), undecayed=undecayed(model),
        checkpoint=checkpoint, key=key, notes={} if job.spec == job.asked else {"composed": job.spec},
    )  # fmt: skip


def _loss_of(job: Job, run: Forward) -> Any:
    if job.task.multilabel:
        return _several(job.recipe.label_smoothing, run, job.weights)
    return _loss(job.recipe, len(job.task.classes), run, job.weights)


def _several(smoothing: float, run: Forward, weights: Tensor | None) -> Any:
    """Binary cross-entropy of each label by itself; one that an image bears counts by its weight, where there are any."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        wanted, own = y * (1 - smoothing) + smoothing / 2, None if weights is None else weights.to(y.device)
        return F.binary_cross_entropy_with_logits(run(model, x).float(), wanted, pos_weight=own)

    return loss


def _loss(recipe: Recipe, classes: int, run: Forward, weights: Tensor | None) -> Any:
    """Cross-entropy, of mixed images where a recipe mixes them; each image's times the weight of its class, where there are any."""
    mix, smoothing = None, recipe.label_smoothing
    plain: Any = partial(F.cross_entropy, label_smoothing=smoothing)
    if mixes(recipe):
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
        plain, smoothing = SoftTargetCrossEntropy(), 0.0

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch if mix is None else mix(*batch)
        logits = run(model, x).float()
        if weights is None:
            return plain(logits, y)
        own = weights.to(y.device)
        each = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        return (each * (own[y] if mix is None else y @ own)).mean()

    return loss

"""Train a delta: backbone and data in, one self-describing file out."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtzoo import data as D
from vtzoo import files, knobs, machine, own_loss, parallel, registry, talk, tracking
from vtzoo.anatomy import survey
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_sized, set_depth
from vtzoo.delta import Delta, listed
from vtzoo.devices import accelerator, emulates
from vtzoo.errors import NotFound, UsageError
from vtzoo.feed import Feed, mine
from vtzoo.fit import checkpoint_path, fit, forget
from vtzoo.identity import CARD
from vtzoo.installed import installed
from vtzoo.lineage import check_images, record
from vtzoo.live import extract, inject, trainable
from vtzoo.methods._protocol import composes, prepares, trial
from vtzoo.methods._protocol import recipe as method_recipe
from vtzoo.portions import portion
from vtzoo.prefix import Prefix
from vtzoo.presets import preset
from vtzoo.probes import asked_for, best_of, sweep
from vtzoo.recipe import Recipe, facts_of, read
from vtzoo.results import Trained
from vtzoo.sampling import chosen, class_weights
from vtzoo.score import brief, logits_of, measure
from vtzoo.sensitivity import IMAGES
from vtzoo.spec import BackboneCard, Task
from vtzoo.speech import spoken
from vtzoo.train_job import Job, cut, feed_of, forecast_of, head_of, mixes, plan_of, searched
from vtzoo.zoo import Zoo

Watch = Callable[[Mapping[str, Any]], None]


def train(
    *, backbone: str, data: str, method: str = "linear", name: str, zoo: Zoo | None = None,
    recipe: Mapping[str, Any] | None = None, head: str | None = None, resume: bool = False, dry_run: bool = False,
    skip_bad: bool = False, watch: Watch | None = None, track: Sequence[str] = (), awaited: Collection[str] = (),
    words: Mapping[str, str] | None = None, templates: Sequence[str] = (),
) -> Trained:  # fmt: skip
    """Train a delta and its head on a frozen backbone and keep it in the zoo.

    Args:
        backbone: ref of a backbone, or a timm name.
        data: see `vtzoo.data.open_data`; validation is on its val split, test (if any) is measured once at the end.
        method: a stack of methods such as "lora[rank=8]+bitfit".
        name: what to call the delta; the part before the last "/" names its task.
        zoo: where to keep it.
        recipe: training knobs over those of the preset among them, over the method's own; see `vtzoo.recipe.Recipe`.
        head: "linear" (default) or "mlp[…]", short for adding mlp-head to the stack.
        resume: go on from this name's checkpoint.
        dry_run: resolve and report, train nothing.
        skip_bad: leave out broken images.
        watch: is told each epoch's record: epoch, loss, lr, and top1 and val_loss where it was validated.
        track: trackers by accelerate's names ("tensorboard" …) that get these records, as a file of JSON lines always does.
        awaited: digests of the training images that it must be; others are refused before anything is computed.
        words: what a dual encoder's text tower is told of classes, by label; a label with spaces unless given.
        templates: texts around them, each with one {}; "a photo of a {}." unless given.

    Raises:
        Conflict: the name exists.
        NotFound, UsageError, Corrupt: see the parts.
        Interrupted: stopped; a checkpoint is written.

    The checkpoint stays until the delta is kept: when a later step fails, `resume` only measures and keeps. Where torchrun or
    accelerate started several processes, they share each batch; the first one writes, and all return the same.
    """
    tracking.check(track)
    job = _prepare(
        backbone, data, method, name, zoo or Zoo.find(), recipe or {}, head, resume=resume, skip_bad=skip_bad,
        dry_run=dry_run, awaited=awaited, words=words, templates=templates,
    )  # fmt: skip
    params = sum(p.numel() for p in trainable(job.model).values())
    _announce(job, params)
    parallel.agree(job.spec)
    prefix = cut(job) if params else None
    if dry_run:
        return _planned(job, prefix, params)
    checkpoint = checkpoint_path(job.zoo.root, name, "delta")
    _ready(checkpoint, name, resume=resume)
    started, worked = time.monotonic(), time.process_time()
    feed, epochs, probes = feed_of(job, prefix), job.recipe.epochs, list[dict[str, Any]]()
    if job.grid and prefix is not None:
        job, best, probes = _sweep(job, feed, prefix)
        _tell({"epoch": epochs, **best}, _log(job, track, resume=False), watch)
    elif params:
        epochs = len(_run(job, feed, checkpoint, _log(job, track, resume=resume), resume=resume, watch=watch))
    searched(job)
    cost = _cost(time.monotonic() - started + feed.spared, time.process_time() - worked, resumed=resume)
    made = _kept(job, feed, epochs, params, cost, probes)
    forget(checkpoint)
    return made


def _kept(
    job: Job,
    feed: Feed,
    epochs: int,
    params: int,
    cost: Mapping[str, float | None],
    probes: Sequence[Mapping[str, Any]],
) -> Trained:
    """Measure what is trained, and put it in the zoo."""
    try:
        delta = _delta(job, _measured(job, feed, epochs))
        return parallel.by_first(lambda: _keep(job, delta, params, cost, probes))
    except BaseException:
        again = "trains once more, on the kept features" if job.grid else "with --resume measures and keeps it"
        talk.say(f"{job.name} is trained: once the fault is mended, the same command {again}")
        raise


def _planned(job: Job, prefix: Prefix | None, params: int) -> Trained:
    """What a dry run tells."""
    searches = any(composes(registry.load("methods", p.name)) for p in knobs.parse(job.asked))
    plan = forecast_of(job, prefix) if params else {}
    return Trained(
        ref=job.name, path="", recipe=asdict(job.recipe), params=params, method=job.spec, example=searches, plan=plan
    )


def _ready(checkpoint: Path, name: str, *, resume: bool) -> None:
    """Refuse a place that takes no files, and say what a run that starts anew leaves behind."""
    if parallel.rank():
        return
    machine.check_writable(checkpoint.parent)
    if checkpoint.is_file() and not resume:
        talk.say(
            f"an earlier run of {name} was stopped: --resume goes on with it, this one takes its checkpoint's place"
        )


def _cost(seconds: float, cpu_seconds: float, *, resumed: bool) -> dict[str, float | None]:
    """What a training took; of one that was taken up again nobody has noted what it took before."""
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return {k: None if resumed else round(v, 1) for k, v in found.items()}


def _announce(job: Job, params: int) -> None:
    recipe, of = job.recipe, preset(job.recipe.preset).checkpoint
    what = f"{params:,} trainable parameters" if params else "nothing to train"
    rate = f", lr {recipe.lr:g}" if params else ""
    talk.say(f"{job.name}: {job.spec} on {job.card.name}, {what}, {len(job.train)} images{rate}")
    if emulates(accelerator(recipe)):
        talk.say("warning: this processor has no fast bf16: fp32 takes a fraction of the time")
    if of not in ("", job.card.name):
        talk.say(f"recipe {recipe.preset} is published for {of}; on {job.card.name} its numbers are not to be compared")


def _prepare(
    backbone: str, data: str, method: str, name: str, zoo: Zoo, user: Mapping[str, Any], head: str | None, *,
    resume: bool, skip_bad: bool, dry_run: bool, awaited: Collection[str], words: Mapping[str, str] | None, templates: Sequence[str],
) -> Job:  # fmt: skip
    """All that can be refused before a step is taken; in a dry run what searches takes the shortest of its searches."""
    zoo.check_free("deltas", name)
    spec = _with_head(method, head)
    parts = [(p, registry.load("methods", p.name)) for p in knobs.parse(spec)]
    asked = read(user, [(p.name, m.GROUP) for p, m in parts])
    _check_knobs(parts, asked)
    probing = asked_for(parts, asked, user, resume=resume)
    accelerator(asked)
    bare = resolved_card(backbone, zoo)
    whole = D.open_data(data, split="train", skip_bad=skip_bad, several=True)
    images = portion(whole, asked.classes)
    val = portion(D.open_data(data, split="val", skip_bad=skip_bad, several=True), asked.classes).aligned(
        images.classes
    )
    test = _test(data, images.classes, asked, skip_bad=skip_bad) if asked.eval_on != "val" else None
    if test is None and not asked.validates:
        raise UsageError(f"no image of {data} is left to measure", "leave train_on and eval_on out")
    limited, val = chosen(images, val, asked)
    check_images(awaited, (i.digest for i in (limited,)))
    val, test = val.limit(asked.eval_limit), test.limit(asked.eval_limit) if test else None
    weights = class_weights(asked.class_weights, limited)
    _check_batches(asked, len(limited))
    torch.manual_seed(asked.seed)
    card, model = _built(bare, asked, zoo, len(images.classes))
    said, around = spoken(model, images.classes, words or {}, templates, whole.classes)
    plain = D.transforms(card.preprocess, train=False)
    every = any(prepares(m) for _, m in parts)
    seen = limited if every else limited.limit(IMAGES, asked.seed)
    few: Any = _unclassed() if limited.several else D.loader(seen, plain, batch_size=64, seed=asked.seed)
    made = _composed(checkpoint_path(zoo.root, name, "delta")) if resume else ""
    if every or (any(composes(m) for _, m in parts) and not made):
        model.to(accelerator(asked).device)  # much is computed before there is a delta
    stack = "linear" if probing else made or (_tried(parts) if dry_run else spec)
    inject(model, stack, seed=asked.seed, batches=few)
    record = installed(model)
    assert record is not None
    own_loss.check(record.parts, several=bool(images.several))
    resolved = _resolve(asked, [p.module for p in record.parts], survey(model).kind)
    resolved = resolved if trainable(model) else replace(resolved, epochs=0, probe_epochs=0)
    task = Task(
        name=name.rpartition("/")[0] or name, classes=images.classes, preprocess=card.preprocess,
        multilabel=bool(images.several), words=said, templates=around,
    )  # fmt: skip
    grid: tuple[tuple[float, float], ...] = ()
    if probing and images.several:
        raise UsageError("probes are not trained together on images with several labels", "train one: --method linear")
    if probing:
        assert resolved.head_lr is not None
        grid = tuple(
            product(probing.lr or (resolved.head_lr,), probing.weight_decay or (resolved.weight_decay or 0.0,))
        )
    return Job(zoo, name, card, spec, record.spec, model, resolved, task, limited, val, test, grid, weights)


def _check_knobs(parts: Sequence[tuple[knobs.Part, Any]], recipe: Recipe) -> None:
    """Refuse methods' knobs that are no good, before anything is read.

    Raises:
        UsageError: says which, or that a search has no images to look at.
    """
    configs = [knobs.decode(module.Config, part.knobs, part.name) for part, module in parts]
    if not recipe.validates and any(getattr(config, "search", False) for config in configs):
        raise UsageError(
            "search=true looks at validation images, and none are measured", "leave train_on and eval_on out"
        )


def _built(bare: BackboneCard, recipe: Recipe, zoo: Zoo, classes: int) -> tuple[BackboneCard, nn.Module]:
    """The backbone with a fresh head, and its card as this training shows it images."""
    depth: dict[str, Any] = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    card, model = build_sized(bare, recipe.image_size, zoo=zoo, num_classes=classes, **depth)
    set_depth(model, recipe.drop_path)
    if recipe.framing == "squash":
        card = replace(card, preprocess=replace(card.preprocess, crop_pct=1.0, crop_mode="squash"))
    return card, model


def _unclassed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches for methods that look at classes, which images with several labels each don't have; refused once they are asked for."""
    yield from ()
    raise UsageError("this method chooses by classes, and an image here has several labels", "choose another method")


def _tried(parts: Sequence[tuple[knobs.Part, Any]]) -> str:
    """The spec for a dry run, in which what composes a stack draws one instead of searching."""
    for part, module in parts:
        if composes(module):
            talk.say(f"{part.name} searches when it trains; what is said here is of a stack that it might find")
    return "+".join(str(trial(part, module)) for part, module in parts)


def _composed(checkpoint: Path) -> str:
    """The stack that a run to be resumed has composed; nothing where it composed none, or there is no such run."""
    return files.header(checkpoint).metadata.get("composed", "") if checkpoint.is_file() else ""


def _check_batches(recipe: Recipe, count: int) -> None:
    """Refuse what mixing can't do: it pairs the images of whole batches.

    Raises:
        UsageError: odd batches, or fewer images than one.
    """
    size = recipe.batch_size
    if not mixes(recipe):
        return
    if size % 2:
        raise UsageError(f"mixup and cutmix need an even batch size, not {size}", f"use --batch-size {size + 1}")
    if count < size:
        hint = f"use --batch-size {count - count % 2}, or more images" if count > 1 else "use more images"
        raise UsageError(f"mixup and cutmix need whole batches, and {count} images make none of {size}", hint)


def _with_head(method: str, head: str | None) -> str:
    if head in (None, "linear"):
        return method
    part = knobs.one(head)
    if part.name not in ("mlp", "mlp-head"):
        raise UsageError(f"no head is called '{part.name}'", "use --head linear or --head mlp[hidden=256]")
    return f"{method}+{knobs.Part('mlp-head', part.knobs)}"


def _resolve(recipe: Recipe, modules: list[Any], kind: str) -> Recipe:
    """Fill in what the user left open: the most careful learning rate of the stack's methods, and for the head the probe's."""
    defaults = [method_recipe(m, kind) for m in modules]
    probe = method_recipe(registry.load("methods", "linear"), kind)["lr"]
    lr = recipe.lr or min((d["lr"] for d in defaults if "lr" in d), default=1e-3)
    head_lr = recipe.head_lr or recipe.lr or min((d["head_lr"] for d in defaults if "head_lr" in d), default=probe)
    decay = (
        recipe.weight_decay
        if recipe.weight_decay is not None
        else max((d.get("weight_decay", 0.0) for d in defaults), default=0.0)
    )
    return replace(recipe, lr=lr, head_lr=head_lr, weight_decay=decay)


def _sweep(job: Job, feed: Feed, prefix: Prefix) -> tuple[Job, dict[str, Any], list[dict[str, Any]]]:
    """Train every probe; the model holds the best one, and the recipe has its rate. It, and all of them, are given back."""
    found = sweep(head_of(job.model, prefix), feed, job.recipe, job.grid, job.weights)
    best = best_of(found)
    talk.say(f"{len(found)} probes: the best has lr {best.lr:g} and weight_decay {best.weight_decay:g}")
    recipe = replace(job.recipe, lr=best.lr, head_lr=best.lr, weight_decay=best.weight_decay)
    return replace(job, recipe=recipe), asdict(best), [asdict(p) for p in found]


def _tell(record: Mapping[str, Any], log: tracking.Log | None, watch: Watch | None) -> None:
    """Note the probe that was chosen; of probes that learn side by side nobody has seen the epochs."""
    if log is not None:
        log(record)
        log.finish([record])
    if watch is not None:
        watch(record)


def _log(job: Job, track: Sequence[str], *, resume: bool) -> tracking.Log | None:
    """Where the first process notes each epoch."""
    if parallel.rank():
        return None
    facts = {"method": job.spec, "backbone": job.card.name, "images": len(job.train), **asdict(job.recipe)}
    path = (
        job.zoo.root / ".vtzoo" / "logs" / checkpoint_path(job.zoo.root, job.name, "delta").with_suffix(".jsonl").name
    )
    return tracking.Log(path, job.name, facts, track, fresh=not resume)


def _run(
    job: Job, feed: Feed, checkpoint: Path, log: tracking.Log | None, *, resume: bool, watch: Watch | None
) -> list[dict[str, Any]]:
    """Train; the model holds the result."""
    watch = watch if log is None else tracking.both(log, watch)
    history = fit(replace(plan_of(job, feed, checkpoint), watch=watch), resume=resume)
    if log is not None:
        log.finish(history)
    chance = math.log(2 if job.task.multilabel else len(job.task.classes))
    if history and history[-1]["loss"] > 2 * chance + 1:
        loss = history[-1]["loss"]
        talk.say(f"warning: the training loss is {loss:.3g}, far above guessing ({chance:.3g}): try a lower --lr")
    return history


def _measured(job: Job, feed: Feed, epochs: int) -> dict[str, Any]:
    """What the trained model does on val and test."""
    metrics: dict[str, Any] = {"epochs": epochs}
    val = job.val if job.recipe.validates else None
    if val and job.recipe.precision == "fp32":  # what is kept in fewer bits is not measured in these
        metrics["val"] = brief(measure(*logits_of(job.model, feed.held_out(), feed.run, feed.held)))
    for split, images in (("val", val), ("test", job.test)):
        if images is not None and split not in metrics:
            plain = D.transforms(job.task.preprocess, train=False)
            batches = D.loader(mine(images), plain, batch_size=job.recipe.batch_size)
            metrics[split] = brief(measure(*logits_of(job.model, batches, shared=len(images))))
    if skipped := len(job.train.skipped) + len(job.val.skipped):
        metrics["skipped"] = skipped
    return metrics


def _test(data: str, classes: tuple[str, ...], recipe: Recipe, *, skip_bad: bool) -> D.Images | None:
    try:
        images = D.open_data(data, split="test", skip_bad=skip_bad, several=True)
    except NotFound:
        return None
    return portion(images, recipe.classes).aligned(classes)


def _delta(job: Job, metrics: Mapping[str, Any]) -> Delta:
    composed = {} if job.spec == job.asked else {"composed_by": job.asked}
    seen = {"data": f"sha256:{job.train.digest}", "images": len(job.train), "seed": job.recipe.seed}
    lineage = record("train", **seen, **composed)
    return extract(
        job.model,
        tasks=[job.task],
        backbone=getattr(job.model, CARD),
        metrics=metrics,
        recipe=facts_of(job.recipe),
        lineage=lineage,
    )


def _keep(
    job: Job, delta: Delta, params: int, cost: Mapping[str, float | None], probes: Sequence[Mapping[str, Any]]
) -> Trained:
    """Put the delta in the zoo; what its training took of this machine stands in the index alone."""
    digest = listed(delta, job.zoo, job.name, cost)
    return Trained(
        method=job.spec,
        ref=job.name,
        path=str(job.zoo.object(digest)),
        metrics={"seconds": cost["seconds"], **delta.metrics, **({"probes": list(probes)} if probes else {})},
        recipe=asdict(job.recipe),
        params=params,
        digest=digest,
    )

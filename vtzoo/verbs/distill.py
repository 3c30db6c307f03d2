"""Teach a small network what any ref knows: a backbone, a delta, a merge or a folded model."""

import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import yaml
from timm.models import is_model
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import knobs, parallel, registry, talk
from vtzoo.anatomy import head_names
from vtzoo.artifact import described, open_ref, store_model
from vtzoo.backbone import build_card, card_of, create, sized, taking, timm_card
from vtzoo.devices import accelerator
from vtzoo.errors import Mismatch, NotFound, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state
from vtzoo.fit import Plan, checkpoint_path, fit
from vtzoo.losses._outputs import Outputs, Shapes
from vtzoo.recipe import Recipe, facts_of
from vtzoo.results import Distilled
from vtzoo.score import brief, logits_of, measure
from vtzoo.spec import BackboneCard, plain
from vtzoo.targets import Answers, Teaching, digest_of, facts, outputs, prepared, ready
from vtzoo.zoo import Zoo

HELD_OUT = 0.02
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "epochs": 20, "batch_size": 64}
UNUSED = frozenset(
    {
        "augment", "cache", "class_weights", "crop_area", "cutmix", "drop_path", "eval_limit", "eval_on", "fold", "folds", "framing", "head_lr",
        "label_smoothing", "layer_decay", "mixup", "parallel", "preset", "sampling", "shots", "train_on", "views",
    }
)  # fmt: skip
"""Training knobs without a meaning here: both sides see the same plain crops of all images, as many as `--views`, and the loss has its own
knobs."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything resolved, nothing computed yet; `start` says what the student's weights are: pretrained or random."""

    zoo: Zoo
    name: str
    teaching: Teaching
    student: nn.Module
    card: BackboneCard
    start: str
    recipe: Recipe
    loss: ModuleType
    spec: dict[str, Any]


def distill(
    *, teachers: Sequence[str], student: str, data: str, loss: str = "kd", name: str, task: str | None = None, zoo: Zoo | None = None,
    recipe: Mapping[str, Any] | None = None, resume: bool = False, skip_bad: bool = False, views: int = 4, teacher_size: int | None = None,
) -> Distilled:  # fmt: skip
    """Train a student on its teachers' answers and keep it in the zoo as a plain model.

    Args:
        teachers: refs; several are averaged (logits) or set side by side (features).
        student: a backbone's or model's name or a tagged timm name ("resnet18.a1_in1k"), which starts from its own weights; or
            a bare timm architecture, from random ones. Arguments may follow: "vit_tiny_patch16_224[depth=8,pretrained=false]".
        data: images; any folder tree for a loss that needs no labels.
        loss: "kd[temperature=4]", "hard", "feature".
        name: what to call the student.
        task: whose head teaches; unless given, the one whose classes are the data's (none for a loss without logits).
        zoo: where to keep it; target files are kept in its cache.
        recipe: training knobs; see `vtzoo.recipe.Recipe`. `image_size` is the student's.
        resume: go on from this name's checkpoint.
        skip_bad: leave out broken images.
        views: crops of each image that the teacher answers.
        teacher_size: side in pixels at which bare convolutional teachers look; their own unless given.

    Returns:
        `metrics` of student and teacher on the validation split, where labels are the task's; `report` with sizes and agreement.

    Raises:
        Mismatch: the loss needs logits and a teacher has no head, or the data's classes are others.
        Network: the student's own weights must be fetched and can't be.
        Conflict: the name exists.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("models", name)
    if views < 1 or (teacher_size is not None and teacher_size < 8):
        raise UsageError(
            f"views={views}, teacher_size={teacher_size}: there is nothing to see", "views from 1, sizes from 8 pixels"
        )
    module, spec = _loss(loss)
    needs: Sequence[str] = module.NEEDS
    settings = _recipe(recipe or {})
    opened = [open_ref(t, zoo) for t in teachers]
    images = D.open_data(data, split="train", skip_bad=skip_bad, labelled="logits" in needs)
    live, images = ready(opened, task, images, teacher_size, labelled="logits" in needs)
    torch.manual_seed(settings.seed)
    model, card, start = _student(student, zoo, len(images.classes) if "logits" in needs else 0, settings.image_size)
    teaching = Teaching(
        teachers=live, digests=[digest_of(a) for a in opened], images=images.limit(settings.limit, settings.seed), student=card.preprocess,
        needs=needs, views=views, min_scale=0.35, seed=settings.seed, precision=settings.precision, workers=settings.workers,
    )  # fmt: skip
    job = _Job(zoo=zoo, name=name, teaching=teaching, student=model, card=card, start=start, recipe=settings, loss=module, spec=spec)  # fmt: skip
    history = _fit(job, resume=resume)
    return _keep(job, history, _measured(job, data, skip_bad=skip_bad) if "logits" in needs else {})


def _loss(text: str) -> tuple[ModuleType, dict[str, Any]]:
    """A loss's file, and its name with all knobs as facts."""
    part = knobs.one(text)
    module = registry.load("losses", part.name)
    if unseen := set(module.NEEDS) - {"logits", "features"}:
        raise UsageError(f"the loss '{part.name}' looks at {' and '.join(sorted(unseen))}, which distill doesn't show", "choose another (vtzoo losses)")  # fmt: skip
    chosen = knobs.decode(getattr(module, part.name.replace("-", "_")), part.knobs, part.name)
    assert isinstance(chosen, dict)
    return module, {"function": part.name, **chosen}


def _of(job: _Job, name: str) -> Callable[..., Any] | None:
    """One of the loss file's functions with those of the knobs that it names; None where the file has none of that name."""
    function = getattr(job.loss, name, None)
    if function is None:
        return None
    named = inspect.signature(function).parameters
    return partial(function, **{k: v for k, v in job.spec.items() if k in named})


def _recipe(user: Mapping[str, Any]) -> Recipe:
    recipe = knobs.decode(Recipe, {**DEFAULTS, **user}, "recipe")
    assert isinstance(recipe, Recipe)
    if ignored := sorted(UNUSED & set(user)):
        raise UsageError(
            f"distillation has no use for {', '.join(ignored)}",
            "leave it out; a loss has its own knobs (vtzoo losses), and --views says how many crops are seen",
        )
    accelerator(recipe)  # refuses what this machine lacks, before the teacher's answers are computed
    if parallel.count() > 1:
        raise UsageError("distillation runs in one process", "start it without torchrun")
    return recipe


def _student(text: str, zoo: Zoo, classes: int, pixels: int | None) -> tuple[nn.Module, BackboneCard, str]:
    """Build it at its input size; its weights are "pretrained" or "random"."""
    part = knobs.one(text) if "[" in text else knobs.Part(text, {})
    args: dict[str, Any] = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in part.knobs.items()}
    card, known = _card(part.name, zoo)
    pretrained = args.pop("pretrained", known)
    if not isinstance(pretrained, bool):
        raise UsageError(f"pretrained={pretrained!r} is neither true nor false", f"{part.name}[pretrained=false]")
    if fixed := sorted({"num_classes", "in_chans"} & set(args)):
        raise UsageError(
            f"a student's {' and '.join(fixed)} can't be chosen: its teacher and the images decide", "leave it out"
        )
    side = args.get("img_size", pixels)
    if side is not None and (not isinstance(side, int) or pixels not in (None, side)):
        raise UsageError(f"the student's img_size is {side}, --image-size {pixels}", "give one of them, one number of pixels")  # fmt: skip
    card, sizing = sized(card, side)
    args = {**card.model_args, **sizing, **args}
    start = "pretrained" if pretrained else "random"
    talk.say(f"student {part.name} starts from {start} weights")
    if not pretrained:
        model = taking(card, side, lambda: create(card.arch, pretrained=False, num_classes=classes, **args))
        shape = replace(card.preprocess, crop_pct=1.0, crop_mode="center")
        made = BackboneCard(name=card.arch, arch=card.arch, model_args=args, preprocess=shape, head=head_names(model))
        return model.requires_grad_(), made, start
    model = taking(card, side, lambda: _pretrained(card, args, zoo, classes))
    return model.requires_grad_(), replace(card, model_args=args), start


def _pretrained(card: BackboneCard, args: dict[str, Any], zoo: Zoo, classes: int) -> nn.Module:
    """Build with weights; refuses arguments that would leave some of them out or some of the network random."""
    refusal = ShapeMismatch(
        f"the weights of {card.name} do not fit {plain(args)}", "leave arguments out, or add pretrained=false to them"
    )
    try:
        model = build_card(card, zoo=zoo, num_classes=classes, **args)
    except RuntimeError as error:
        raise refusal from error
    if args != card.model_args:  # timm loads what has a name on both sides, and only logs the rest
        own = create(card.arch, pretrained=False, num_classes=0, **card.model_args)
        if set(base_state(model)) != set(base_state(own)):
            raise refusal
    return model


def _card(name: str, zoo: Zoo) -> tuple[BackboneCard, bool]:
    """A student's card, and whether its name stands for weights: a bare architecture that is no entry's name doesn't."""
    sections = {e.section for e in zoo.entries() if e.name == name}
    if "models" in sections:
        model = open_ref(name, zoo)
        assert model.files is not None
        card, _ = described(model.files)
        return replace(card, name=name, source=f"object:sha256:{model.digest}"), True
    if is_model(name) and "." not in name and "backbones" not in sections:
        return timm_card(name), False
    try:
        return card_of(name, zoo), True
    except NotFound:
        if sections:
            raise  # it says what the entry is instead
        return timm_card(name), False


@dataclass(kw_only=True)
class _Lessons:
    """What the student sees and how it is judged: epoch e reads view e mod V; a fiftieth of the images is held out.

    `standard` takes the teachers' features to the form in which they are taught, `bridge` the student's outputs to theirs.
    """

    job: _Job
    answers: Answers
    train: list[int]
    held: list[int]
    function: Callable[..., Tensor]
    standard: nn.Module | None
    bridge: nn.Module | None

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        recipe, shuffled = self.job.recipe, list(self.train)
        random.Random(f"{recipe.seed}/{epoch}").shuffle(shuffled)
        for i in range(start * recipe.batch_size, len(shuffled), recipe.batch_size):
            view = epoch % self.job.teaching.views
            yield self.answers.rows(view, shuffled[i : i + recipe.batch_size], self.job.card.preprocess)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, labels, features, logits = batch
        ours = outputs(model, x, self.job.teaching.needs)
        ours = ours if self.bridge is None else self.bridge(ours)
        taught = self.standard.to(x.device)(features) if self.standard is not None else features
        theirs = Outputs(logits if logits.numel() else None, taught if features.numel() else None)
        return self.function(ours, theirs, labels)

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        was, model = model.training, model.eval()
        batch = self.answers.rows(0, self.held, self.job.card.preprocess)
        device = next(model.parameters()).device
        value = self.loss(model, tuple(t.to(device) for t in batch)).item()
        model.train(was)
        return {"val_loss": value}


def _lessons(job: _Job) -> _Lessons:
    size = len(job.teaching.images)
    if size < 2:
        raise UsageError("one image is too few: some are held out", "give more images, or a larger limit")
    files = prepared(job.teaching, job.zoo.root / ".vtzoo" / "cache" / "targets")
    order = list(range(size))
    random.Random(job.recipe.seed).shuffle(order)
    count = max(1, int(size * HELD_OUT))
    train, held = order[count:], order[:count]
    function, fitted, made = (_of(job, n) for n in (job.spec["function"].replace("-", "_"), "standard", "bridge"))
    assert function is not None
    features = files[0]["features"].float() if "features" in job.teaching.needs else torch.empty(0, 0)
    width = int(getattr(job.student, "num_features", 0))
    standard = fitted(features, width) if fitted else None
    bridge = made(Shapes(features=width), Shapes(features=features.shape[1])) if made else None
    return _Lessons(job=job, answers=Answers(files), train=train, held=held, function=function, standard=standard, bridge=bridge)  # fmt: skip


def _fit(job: _Job, *, resume: bool) -> list[dict[str, Any]]:
    lessons = _lessons(job)
    what = [job.teaching.key(0), job.teaching.views, facts_of(job.recipe), job.spec, job.card.json(), job.start]
    checkpoint = checkpoint_path(job.zoo.root, job.name, "student")
    plan = Plan(
        model=job.student, loss=lessons.loss, batches=lessons.batches, steps=-(-len(lessons.train) // job.recipe.batch_size),
        recipe=job.recipe, validate=lessons.validate, extra=lessons.bridge, checkpoint=checkpoint,
        key=hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(),
    )  # fmt: skip
    return fit(plan, resume=resume)


def _keep(job: _Job, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Distilled:
    task = job.teaching.teachers[0].task if "logits" in job.teaching.needs else None
    used = {k: v for k, v in facts_of(job.recipe).items() if k not in UNUSED}
    student = {"from": job.card.name, "start": job.start}
    lineage = {"verb": "distill", "loss": job.spec, "recipe": used, "student": student, **facts(job.teaching)}
    params = sum(p.numel() for p in job.student.parameters())
    report: dict[str, Any] = {
        "start": job.start, "params": params, "teacher_params": sum(p.numel() for t in job.teaching.teachers for p in t.model.parameters()),
        "epochs": len(history), "loss": history[-1]["loss"] if history else None,
        "held_out_loss": history[-1].get("val_loss") if history else None,
    }  # fmt: skip
    shown = {k: v["top1"] for k, v in metrics.items()}
    digest = store_model(
        job.zoo, job.name, job.student.eval(), job.card, kind="student", classes=task.classes if task else (),
        facts={
            "tasks": [task.name] if task else [], "metrics": shown or {"held_out_loss": round(report["held_out_loss"] or 0.0, 4)}, "lineage": lineage,
        },
    )  # fmt: skip
    checkpoint_path(job.zoo.root, job.name, "student").unlink(missing_ok=True)
    talk.say(f"{job.name}: {params:,} parameters, teacher {report['teacher_params']:,}")
    return Distilled(ref=job.name, path=str(job.zoo.object(digest)), metrics=metrics, report=report)


def _measured(job: _Job, data: str, *, skip_bad: bool) -> dict[str, Any]:
    """Student and first teacher on the validation split, and how often they agree; nothing where there is none."""
    teacher = job.teaching.teachers[0]
    if teacher.task is None:
        return {}
    try:
        val = D.open_data(data, split="val", skip_bad=skip_bad).aligned(teacher.task.classes)
    except (Mismatch, NotFound, UsageError):
        return {}
    ours, labels = logits_of(job.student, D.loader(val, D.transforms(job.card.preprocess, train=False), batch_size=64))
    theirs, _ = logits_of(teacher.model, D.loader(val, D.transforms(teacher.preprocess, train=False), batch_size=64))
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return {"student": {**brief(measure(ours, labels)), "agreement": agree}, "teacher": brief(measure(theirs, labels))}

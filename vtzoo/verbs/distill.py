"""Teach a small network what any ref knows: a backbone, a delta, a merge or a folded model."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import knobs, registry, talk
from vtzoo.anatomy import head_names
from vtzoo.artifact import Live, go_live, open_ref, store_model
from vtzoo.backbone import build_card, card_of, create, timm_card
from vtzoo.bases import weights_path
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.files import sha256
from vtzoo.fit import Plan, checkpoint_path, fit
from vtzoo.losses._outputs import Outputs
from vtzoo.recipe import Recipe
from vtzoo.results import Distilled
from vtzoo.score import brief, logits_of, measure
from vtzoo.spec import BackboneCard, Preprocess
from vtzoo.targets import Teaching, facts, normalised, outputs, prepared, statistics
from vtzoo.tensors import TensorFile
from vtzoo.zoo import Zoo

HELD_OUT = 0.02
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "epochs": 20, "batch_size": 64}


@dataclass(frozen=True)
class _Job:
    zoo: Zoo
    name: str
    teachers: list[Live]
    digests: list[str]
    student: nn.Module
    card: BackboneCard
    recipe: Recipe
    loss: Any
    knobs: dict[str, Any]
    images: D.Images
    views: int


def distill(
    *, teachers: Sequence[str], student: str, data: str, loss: str = "kd", name: str, zoo: Zoo | None = None,
    recipe: Mapping[str, Any] | None = None, resume: bool = False, skip_bad: bool = False, views: int = 4, teacher_size: int | None = None,
) -> Distilled:  # fmt: skip
    """Train a student on its teachers' answers and keep it in the zoo as a plain model.

    Args:
        teachers: refs; several are averaged (logits) or set side by side (features).
        student: a timm architecture, with arguments as "vit_tiny_patch16_224[img_size=64,depth=8]", or a backbone's ref.
        data: images; any folder tree for a loss that needs no labels.
        loss: "kd[temperature=4]", "hard", "feature".
        name: what to call the student.
        zoo: where to keep it; target files are kept in its cache.
        recipe: training knobs; see `vtzoo.recipe.Recipe`.
        resume: go on from this name's checkpoint.
        skip_bad: leave out broken images.
        views: crops of each image that the teacher answers.
        teacher_size: side in pixels at which bare convolutional teachers look; their own unless given.

    Returns:
        `metrics` of student and teacher on the validation split, where labels are the task's; `report` with sizes and agreement.

    Raises:
        Mismatch: the loss needs logits and a teacher has no head, or the data's classes are others.
        Conflict: the name exists.
    """
    job = _prepare(
        teachers, student, data, loss, name, zoo or Zoo.find(), recipe or {}, views, teacher_size, skip_bad=skip_bad
    )
    teaching = Teaching(
        teachers=job.teachers, digests=job.digests, images=job.images, student=job.card.preprocess, needs=job.loss.NEEDS, views=job.views,
        min_scale=0.35, seed=job.recipe.seed, precision=job.recipe.precision, workers=job.recipe.workers,
    )  # fmt: skip
    files = prepared(teaching, job.zoo.root / ".vtzoo" / "cache" / "targets")
    history = _fit(job, files, resume=resume)
    return _keep(job, teaching, data, history)


def _prepare(
    teachers: Sequence[str], student: str, data: str, loss: str, name: str, zoo: Zoo, user: Mapping[str, Any], views: int,
    teacher_size: int | None, *, skip_bad: bool,
) -> _Job:  # fmt: skip
    zoo.check_free("models", name)
    part = knobs.one(loss)
    module = registry.load("losses", part.name)
    chosen = knobs.decode(getattr(module, part.name.replace("-", "_")), part.knobs, part.name)
    recipe = knobs.decode(Recipe, {**DEFAULTS, **user}, "recipe")
    assert isinstance(recipe, Recipe)
    assert isinstance(chosen, dict)
    opened = [open_ref(t, zoo) for t in teachers]
    live = [_looking_at(go_live(a), teacher_size) for a in opened]
    labelled = "logits" in module.NEEDS
    images = D.open_data(data, split="train", skip_bad=skip_bad, labelled=labelled)
    classes = _classes(live, images) if labelled else ()
    torch.manual_seed(recipe.seed)
    model, card = _student(student, zoo, len(classes), recipe.image_size)
    digests = [
        a.digest or (a.card.fingerprint if a.card else "") or sha256(weights_path(one.card, zoo))
        for a, one in zip(opened, live, strict=True)
    ]
    images = images.limit(recipe.limit, recipe.seed)
    return _Job(zoo, name, live, digests, model, card, recipe, module, {"function": part.name, **chosen}, images, views)


def _looking_at(live: Live, pixels: int | None) -> Live:
    size = live.preprocess.input_size
    return (
        live
        if pixels is None
        else replace(live, preprocess=replace(live.preprocess, input_size=(size[0], pixels, pixels)))
    )


def _classes(teachers: Sequence[Live], images: D.Images) -> tuple[str, ...]:
    for live in teachers:
        if live.task is None:
            raise Mismatch(
                f"{live.card.name} has no head, and this loss needs logits", "use --loss feature, or a delta as teacher"
            )
        if images.classes != live.task.classes:
            raise Mismatch(
                f"the data's classes are not those of task '{live.task.name}'",
                "use the task's own images, or --loss feature",
            )
    return images.classes


def _student(text: str, zoo: Zoo, classes: int, pixels: int | None) -> tuple[nn.Module, BackboneCard]:
    """A fresh architecture with arguments, or a pretrained backbone."""
    part = knobs.one(text) if "[" in text else knobs.Part(text, {})
    try:
        card = card_of(part.name, zoo)
        known = bool(card.fingerprint) and not part.knobs
    except NotFound:
        card, known = timm_card(part.name), False
    if known:
        return build_card(card, zoo=zoo, num_classes=classes).requires_grad_(), card
    args = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in part.knobs.items()}
    model = create(card.arch, pretrained=False, num_classes=classes, **args)
    given = pixels or args.get("img_size")
    side = given if isinstance(given, int) else card.preprocess.input_size[1]
    preprocess = Preprocess(
        input_size=(3, side, side),
        mean=card.preprocess.mean,
        std=card.preprocess.std,
        interpolation=card.preprocess.interpolation,
    )
    made = BackboneCard(name=card.arch, arch=card.arch, model_args=args, preprocess=preprocess, head=head_names(model))
    return model.requires_grad_(), made


def _fit(job: _Job, files: list[TensorFile], *, resume: bool) -> list[dict[str, Any]]:
    recipe, needs = job.recipe, job.loss.NEEDS
    size = len(job.images)
    order = list(range(size))
    random.Random(recipe.seed).shuffle(order)
    held = order[: max(1, int(size * HELD_OUT))]
    train = order[len(held) :]
    steps = -(-len(train) // recipe.batch_size)
    mean, std = statistics(files[0]) if "features" in needs else (torch.zeros(1), torch.ones(1))
    extra = nn.Linear(int(getattr(job.student, "num_features", 0)), len(mean)) if "features" in needs else None
    view = _View(files)

    def batches(epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        shuffled = list(train)
        random.Random(f"{recipe.seed}/{epoch}").shuffle(shuffled)
        columns = view.at(epoch % len(files))
        for i in range(start, steps):
            index = torch.tensor(shuffled[i * recipe.batch_size : (i + 1) * recipe.batch_size])
            yield _rows(columns, index, job.card.preprocess)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, labels, features, logits = batch
        ours = outputs(model, x, needs)
        if extra is not None and ours.features is not None:
            ours = Outputs(ours.logits, extra(ours.features))
        theirs = Outputs(
            logits if logits.numel() else None,
            (features.float() - mean.to(x.device)) / std.to(x.device) if features.numel() else None,
        )
        chosen = dict(job.knobs)
        return getattr(job.loss, chosen.pop("function").replace("-", "_"))(ours, theirs, labels, **chosen)

    @torch.inference_mode()
    def validate(model: nn.Module) -> dict[str, float]:
        was, model = model.training, model.eval()
        batch = _rows(view.at(0), torch.tensor(held), job.card.preprocess)
        device = next(model.parameters()).device
        value = loss(model, tuple(t.to(device) for t in batch)).item()
        model.train(was)
        return {"val_loss": value}

    key = hashlib.sha256(
        json.dumps(
            [job.digests, asdict(recipe), job.knobs, job.card.json(), job.images.digest, size], sort_keys=True
        ).encode()
    ).hexdigest()
    checkpoint = checkpoint_path(job.zoo.root, job.name, "student")
    plan = Plan(
        model=job.student,
        loss=loss,
        batches=batches,
        steps=steps,
        recipe=recipe,
        validate=validate,
        extra=extra,
        checkpoint=checkpoint,
        key=key,
    )
    return fit(plan, resume=resume)


class _View:
    """The columns of one view at a time in memory."""

    def __init__(self, files: list[TensorFile]) -> None:
        self.files, self.index, self.columns = files, -1, dict[str, Tensor]()

    def at(self, index: int) -> dict[str, Tensor]:
        if index != self.index:
            self.index, self.columns = index, dict(self.files[index])
        return self.columns


def _rows(columns: Mapping[str, Tensor], index: Tensor, shape: Preprocess) -> tuple[Tensor, ...]:
    none = torch.empty(len(index), 0)
    features, logits = columns.get("features"), columns.get("logits")
    x = normalised(columns["pixels"][index], shape)
    return (
        x,
        columns["labels"][index],
        none if features is None else features[index],
        none if logits is None else logits[index],
    )


def _keep(job: _Job, teaching: Teaching, data: str, history: list[dict[str, Any]]) -> Distilled:
    task = job.teachers[0].task if "logits" in job.loss.NEEDS else None
    metrics = _measured(job, data) if task else {}
    lineage = {"verb": "distill", "loss": job.knobs, "recipe": asdict(job.recipe), **facts(teaching)}
    params = sum(p.numel() for p in job.student.parameters())
    report = {
        "params": params, "teacher_params": sum(p.numel() for t in job.teachers for p in t.model.parameters()), "epochs": len(history),
        "loss": history[-1]["loss"] if history else None, "held_out_loss": history[-1].get("val_loss") if history else None,
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


def _measured(job: _Job, data: str) -> dict[str, Any]:
    """Student and first teacher on the validation split, and how often they agree."""
    try:
        val = D.open_data(data, split="val")
    except (NotFound, UsageError):
        return {}
    teacher = job.teachers[0]
    ours, labels = logits_of(job.student, D.loader(val, D.transforms(job.card.preprocess, train=False), batch_size=64))
    theirs, _ = logits_of(teacher.model, D.loader(val, D.transforms(teacher.preprocess, train=False), batch_size=64))
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return {"student": {**brief(measure(ours, labels)), "agreement": agree}, "teacher": brief(measure(theirs, labels))}

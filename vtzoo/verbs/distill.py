"""Teach a small network what any refs know: backbones, deltas, merges or folded models, of one task or of many."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vtzoo import dna, knobs, parallel, talk
from vtzoo.artifact import open_ref, store_model
from vtzoo.crops import Crops
from vtzoo.devices import accelerator
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.faculty import School, lessons_of
from vtzoo.fit import Plan, checkpoint_path, fit, forget
from vtzoo.giver import SLIM, Giver
from vtzoo.grading import NO_TEACHER, Exam, effort, lines, measured
from vtzoo.installed import head_state
from vtzoo.lessons import Course, Labels, prepared
from vtzoo.lineage import bare, check_images, record
from vtzoo.machine import told
from vtzoo.masks import is_masked
from vtzoo.objective import Term, needs_of, read
from vtzoo.outputs import check_parts
from vtzoo.probing import work
from vtzoo.pupil import Pupil
from vtzoo.recipe import Recipe, facts_of
from vtzoo.results import Distilled
from vtzoo.spec import AND, Task
from vtzoo.speed import in_onnx, pinned, timed
from vtzoo.student import Student, build_student
from vtzoo.targets import Lesson, compared
from vtzoo.tensors import fill
from vtzoo.zoo import Zoo

DEFAULTS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "epochs": 20, "batch_size": 64, "augment": "crop"}
UNUSED = frozenset(
    {
        "class_weights", "cutmix", "drop_path", "eval_limit", "eval_on", "fold", "folds", "framing", "head_lr",
        "label_smoothing", "layer_decay", "parallel", "preset", "sampling", "shots", "train_on", "views",
    }
)  # fmt: skip
"""Training knobs without a meaning here: both sides see the same crops of all images, as many as `--views`, and the loss has its own
knobs."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything resolved, nothing computed yet."""

    zoo: Zoo
    name: str
    student: Student
    student_text: str
    giver: Giver | None
    lessons: Sequence[Lesson]
    recipe: Recipe
    terms: Sequence[Term]
    views: int
    data: Mapping[str, str]
    skip_bad: bool

    @property
    def tasks(self) -> list[Task]:
        """Those that the student gets a classifier for."""
        shape = self.student.card.preprocess
        return [Task(name=n.name, classes=n.classes, preprocess=shape) for n in self.lessons if n.classes]

    @property
    def facts(self) -> list[Any]:
        """What decides the student's weights beside the loss."""
        lessons = [n.facts for n in self.lessons]
        how = [facts_of(self.recipe), self.recipe.cache]
        giver = [self.giver.digest] if self.giver else []
        return [lessons, self.views, how, self.student.card.json(), self.student.start, *giver]


def distill(
    *, teachers: Sequence[str], student: str, data: str | Mapping[str, str], loss: str = "kd", name: str, task: str | None = None,
    zoo: Zoo | None = None, recipe: Mapping[str, Any] | None = None, resume: bool = False, skip_bad: bool = False, views: int = 4,
    teacher_size: int | None = None, baseline: bool = False, check: int = 0, init: str | None = None, init_from: str | None = None,
    latency: bool = False, awaited: Collection[str] = (),
) -> Distilled:  # fmt: skip
    """Train a student on its teachers' answers and keep it in the zoo as a plain model, with a classifier for each task.

    Args:
        teachers: refs; several of one task are averaged (logits) or compared with in turn (features, maps). A merge teaches all its tasks.
        student: a backbone's or model's name or a tagged timm name ("resnet18.a1_in1k"), which starts from its own weights; or
            a bare timm architecture, from random ones. Arguments may follow: "vit_tiny_patch16_224[depth=8,pretrained=false]". Or
            "slim[macs=0.5]": a smaller network made of the first teacher, or of `init_from`. Or "dna[latency_ms=2]": one that is searched
            for with the first teacher.
        data: images, of several tasks as {task: images}; any folder tree for a loss that needs no labels.
        loss: "kd[temperature=4]", or a sum: "kd+0.5*feature".
        name: what to call the student.
        task: whose head teaches; unless given, the one whose classes are the data's (none for a loss without logits).
        zoo: where to keep it; what teachers answered is kept in its cache.
        recipe: `vtzoo.recipe.Recipe`; `image_size` is the student's, `augment`, `crop_area` and `mixup` say what both sides see.
        resume: go on from this name's checkpoint.
        skip_bad: leave out broken images.
        views: crops of each image, shown in turn; 0, with cache=off alone, shows new ones in each epoch.
        teacher_size: side in pixels at which convolutional teachers look; their own unless given.
        baseline: also train the same student for as long on the labels alone, to compare.
        check: ask the teachers again for so many of the kept answers, and compare.
        init: how the student gets its first weights from another network, "weight-selection", "net2net"; see `vtzoo.inits`.
        init_from: which; the first teacher unless given.
        latency: also time student and teachers in onnxruntime, one image at a time in one thread.
        awaited: digests of the images that may be taught on; others are refused before anything is computed.

    Returns:
        `metrics` of student, teachers and baseline on each task's test (else validation) images; `report`: what is kept, and what it costs.

    Raises:
        Mismatch: the loss needs logits and a teacher has no head, or the data's classes are others.
        Network: the student's own weights must be fetched and can't be.
        Corrupt: kept answers are not the teachers'.
        Conflict: the name exists.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("models", name)
    if resume and not checkpoint_path(zoo.root, name, "student").is_file():
        raise NotFound("there is no checkpoint to resume", "start without --resume")
    settings = _recipe(recipe or {})
    terms, given = read(loss), {"": data} if isinstance(data, str) else dict(data)
    _check_asked(settings, terms, views, teacher_size, check)
    school = School(
        teachers=[open_ref(t, zoo) for t in teachers], crops=_crops(settings), needs=needs_of(terms), recipe=settings, pixels=teacher_size, skip_bad=skip_bad,
    )  # fmt: skip
    if baseline and not school.labelled:
        raise UsageError(
            "without labels the student can't learn alone", "leave --baseline out, or use a loss on logits"
        )
    way = _way(student, init, init_from)
    lessons = lessons_of(school, given, task)
    check_images(awaited, (n.images.digest for n in lessons))
    giver = _giver(zoo, way, init_from, lessons) if way else None
    job = _job(zoo, name, school, lessons, given, student, giver, terms, views)
    return _taught(job, resume=resume, baseline=baseline, check=check, latency=latency)


def _way(student: str, init: str | None, ref: str | None) -> str | None:
    """How the student gets its first weights from another network, if it does."""
    slim = student.partition("[")[0] == SLIM
    if slim and init:
        raise UsageError("a slimmed student has its first weights already", "leave --init out")
    if ref and not init and not slim:
        raise UsageError("--init-from says whose weights, and not how", "add --init weight-selection (see vtzoo inits)")
    return student if slim else init


def _giver(zoo: Zoo, way: str, ref: str | None, lessons: Sequence[Lesson]) -> Giver:
    """Who gives the student its first weights, and a classifier with them for each of its tasks that it knows with the same classes."""
    artifact = open_ref(ref, zoo) if ref else lessons[0].teachers[0].artifact
    several = len(lessons) > 1
    known = {t.name: sorted(t.classes) for t in artifact.tasks}
    if several and artifact.delta is not None and is_masked(artifact.delta):
        known = {}  # each task has a trunk of its own
    tasks = {n.name: n.classes for n in lessons if n.classes and sorted(n.classes) == known.get(n.name)}
    return Giver(way, artifact, tasks, several)


def _built(zoo: Zoo, text: str, lessons: Sequence[Lesson], recipe: Recipe, giver: Giver | None, views: int) -> Student:
    """A fresh student, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    if giver and giver.way == text:
        return giver.slim([n.images for n in lessons], recipe.image_size)
    if text.partition("[")[0] == dna.NAME:
        made = dna.searched(text, zoo, lessons, recipe, views)
    else:
        made = build_student(text, zoo, len(lessons[0].classes), recipe.image_size)
    return giver.give(made) if giver else made


def _job(
    zoo: Zoo, name: str, school: School, lessons: Sequence[Lesson], data: Mapping[str, str], student: str, giver: Giver | None,
    terms: Sequence[Term], views: int,
) -> _Job:  # fmt: skip
    """The student built, and all that is asked of it."""
    recipe, views = school.recipe, school.crops.distinct(views)
    return _Job(
        zoo=zoo, name=name, student=_built(zoo, student, lessons, recipe, giver, views), student_text=student, giver=giver, lessons=lessons,
        recipe=recipe, terms=terms, views=views, data=dict(zip([n.name for n in lessons], data.values(), strict=True)),
        skip_bad=school.skip_bad,
    )  # fmt: skip


def _online(recipe: Recipe, terms: Sequence[Term]) -> bool:
    """Whether teachers answer in every step: nothing shall be kept, or maps are compared, which are too large to be."""
    return recipe.cache == "off" or "maps" in needs_of(terms)


def _check_asked(recipe: Recipe, terms: Sequence[Term], views: int, teacher_size: int | None, check: int) -> None:
    """Refuse numbers that leave nothing to see, or to check."""
    if check and _online(recipe, terms):
        why = "with cache=off" if recipe.cache == "off" else "with a loss on maps"
        raise UsageError(f"{why} no answers are kept that could be checked", "leave --check-cache out")
    if views < (0 if recipe.cache == "off" else 1) or (teacher_size is not None and teacher_size < 8):
        raise UsageError(
            f"views={views}, teacher_size={teacher_size}: there is nothing to see",
            "views from 1 (or 0 with --set cache=off), sizes from 8 pixels",
        )


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


def _crops(recipe: Recipe) -> Crops:
    if recipe.crop_area and recipe.augment != "crop":
        raise UsageError(f"augment={recipe.augment} cuts nothing out, and crop_area={recipe.crop_area} says how much", "leave one of them out")  # fmt: skip
    if recipe.augment == "strong":
        raise UsageError("augment=strong shows each side something else", "use augment=crop, flip or none")
    return Crops(augment=recipe.augment, area=recipe.crop_area or Crops().area, mixup=recipe.mixup)


def _taught(job: _Job, *, resume: bool, baseline: bool, check: int, latency: bool) -> Distilled:
    """Prepare, train, measure, keep."""
    pupil = _pupil(job, job.student)
    online = _online(job.recipe, job.terms)
    if online and job.recipe.cache != "off":
        talk.say("this loss compares maps, which are not kept: the teachers answer in every step")
    folder = None if online else job.zoo.root / ".vtzoo" / "cache" / "targets"
    shape = job.student.card.preprocess
    course, objective = prepared(job.lessons, pupil, job.terms, shape, job.recipe, job.views, folder)
    checks = [compared(answers, job.views, check) for answers in course.kept] if check else []
    history = _fit(job, course, objective, pupil, "student", resume=resume)
    try:
        pupils = {"": pupil} | ({NO_TEACHER: _alone(job, course, resume=resume)} if baseline else {})
        metrics = measured(Exam(lessons=job.lessons, data=job.data, preprocess=shape, skip_bad=job.skip_bad), pupils)
        more = ({"check": checks} if checks else {}) | (_latencies(job, pupil) if latency else {})
        made = _keep(job, pupil, history, metrics, more)
    except BaseException:
        talk.say(
            f"{job.name} is trained: once the fault is mended, the same command with --resume measures and keeps it"
        )
        raise
    for kind in ("student", "alone"):
        forget(checkpoint_path(job.zoo.root, job.name, kind))
    return made


def _pupil(job: _Job, student: Student) -> Pupil:
    """The student with its classifiers, seen to show what the loss looks at.

    Raises:
        Mismatch: it doesn't.
    """
    pupil = _seated(job, student)
    needs = needs_of(job.terms)
    if "token" in needs:
        train: Any = getattr(pupil.trunk, "set_distilled_training", None)
        if train is None:
            raise Mismatch(
                f"{student.card.name} has no distillation token, and this loss teaches one",
                "use a student such as deit_tiny_distilled_patch16_224, or --loss hard",
            )
        train(enable=True)
    if needs - {"logits"}:
        with pupil.at(0):
            check_parts(pupil.trunk, student.card.preprocess.input_size, student.card.name)
    return pupil


def _seated(job: _Job, student: Student) -> Pupil:
    """The student with a classifier for each task: the one it came with where it has one for the same classes, else a fresh one."""
    pupil = Pupil(student.model, [len(n.classes) for n in job.lessons if n.classes])
    for i, lesson in enumerate(job.lessons):
        if (own := student.heads.get((lesson.name, lesson.classes))) is not None:
            talk.say(f"{lesson.name}: the student comes with a classifier")
            pupil.begin(i, own) if pupil.places else fill(head_state(pupil.trunk), own)
    return pupil


def _fit(
    job: _Job, course: Course, objective: nn.Module, pupil: Pupil, kind: str, *, resume: bool
) -> list[dict[str, Any]]:
    """Train one student by one objective; `kind` tells the student from the one without a teacher."""
    what = [*job.facts, kind, [t.facts for t in job.terms]]
    plan = Plan(
        model=pupil, loss=lambda model, batch: course.loss(_as_pupil(model), objective, batch), batches=course.batches, steps=course.steps,
        recipe=job.recipe, validate=lambda model: course.validate(model, objective), extra=objective if list(objective.children()) else None,
        checkpoint=checkpoint_path(job.zoo.root, job.name, kind), key=hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(),
    )  # fmt: skip
    return fit(plan, resume=resume)


def _as_pupil(model: nn.Module) -> Pupil:
    assert isinstance(model, Pupil)
    return model


def _alone(job: _Job, course: Course, *, resume: bool) -> Pupil:
    """The same student after as many steps on the labels alone."""
    talk.say(f"{job.name}: the same student without a teacher")
    student = _built(job.zoo, job.student_text, job.lessons, job.recipe, job.giver, job.views)
    pupil = _seated(job, student)
    going = resume and checkpoint_path(job.zoo.root, job.name, "alone").is_file()
    _fit(job, replace(course, needs=frozenset({"logits"}), taught=False), Labels(), pupil, "alone", resume=going)
    return pupil


def _keep(
    job: _Job, pupil: Pupil, history: list[dict[str, Any]], metrics: dict[str, Any], more: dict[str, Any]
) -> Distilled:
    """Put the student in the zoo."""
    tasks, several = job.tasks, len(job.tasks) > 1
    licenses = sorted({x for n in job.lessons for t in n.teachers for x in t.card.license.split(AND) if x})
    card = replace(job.student.card, license=AND.join(sorted({*licenses, *_own_license(job)})))
    report: dict[str, Any] = _report(job, pupil, history, metrics) | more
    used = {k: v for k, v in facts_of(job.recipe).items() if k not in UNUSED}
    teachers = list(dict.fromkeys(d for n in job.lessons for t in n.teachers for d in t.digests))
    givers = [t.digests[0] for n in job.lessons for t in n.teachers] + ([job.giver.digest] if job.giver else [])
    lineage = record(
        "distill", dict.fromkeys(bare(d) for d in givers),
        loss=[t.facts for t in job.terms], recipe=used, student=_origin(job), teachers=teachers, licenses=licenses, views=job.views,
        answers="asked" if _online(job.recipe, job.terms) else "kept", lessons=[_lineage(n) for n in job.lessons],
        seed=job.recipe.seed,
    )  # fmt: skip
    shown = {t.name: {k: metrics[t.name][k] for k in ("top1", "retention")} for t in tasks if t.name in metrics}
    kept = (shown if several else next(iter(shown.values()), {})) or {
        "held_out_loss": round(report["held_out_loss"] or 0.0, 4)
    }
    heads = pupil.classifiers([t.name for t in tasks]) if several else None
    with pupil.bare() as trunk:
        digest = store_model(
            job.zoo,
            job.name,
            trunk.eval(),
            card,
            kind="student",
            tasks=tasks,
            heads=heads,
            facts={"metrics": kept, "lineage": lineage, "machine": told()},
        )
    report["size_bytes"] = job.zoo.resolve(job.name, "models").facts["size_bytes"]
    talk.say(f"{job.name}: {report['params']:,} parameters, teachers {report['teacher_params']:,}")
    if licenses:
        talk.say(f"its teachers' licences: {', '.join(licenses)}")
    return Distilled(ref=job.name, path=str(job.zoo.object(digest)), metrics=metrics, report=report)


def _origin(job: _Job) -> dict[str, str]:
    """What the student was, how it got its first weights and from whom, and by which search it was found."""
    found = {"search": job.student_text} if job.student.search else {}
    found |= {"giver": job.giver.digest} if job.giver else {}
    return {"from": job.student.card.name, "start": job.student.start, **found}


def _own_license(job: _Job) -> list[str]:
    """Of what the student's first weights come from, where they aren't random."""
    return [] if job.student.start == "random" else [x for x in job.student.card.license.split(AND) if x]


def _lineage(lesson: Lesson) -> dict[str, Any]:
    """What a student's lineage keeps of a lesson."""
    return {
        "task": lesson.name, "data": f"sha256:{lesson.images.digest}", "images": len(lesson.images),
        "teachers": [d for t in lesson.teachers for d in t.digests], "teacher_tasks": [t.task.name if t.task else "" for t in lesson.teachers],
    }  # fmt: skip


def _latencies(job: _Job, pupil: Pupil) -> dict[str, Any]:
    """Milliseconds of one image in onnxruntime: the student's with one classifier, and all teachers' together."""
    shape, teachers = job.student.card.preprocess, {t.known: t for n in job.lessons for t in n.teachers}
    with pinned(1), pupil.at(0) as trunk:
        own = timed({"student": in_onnx(trunk, shape)}, shape.input_size, (1,))
        theirs = [
            timed({"teacher": in_onnx(t.live.model, t.preprocess)}, t.preprocess.input_size, (1,))
            for t in teachers.values()
        ]
    return {"latency_ms": own[0]["ms"], "teacher_latency_ms": round(sum(t[0]["ms"] for t in theirs), 3)}


def _report(job: _Job, pupil: Pupil, history: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
    """What a student cost, and what it keeps; its losses are of the epoch whose weights are kept."""
    params, macs = work(pupil, job.student.card.preprocess.input_size)
    theirs = effort(job.lessons)
    best = min(history, key=lambda r: r["val_loss"]) if job.recipe.patience and history else (history or [{}])[-1]
    found: dict[str, Any] = {
        "start": job.student.start, "params": params, "macs": macs, "teacher_params": theirs[0], "teacher_macs": theirs[1],
        "images": sum(len(n.images) for n in job.lessons), "views": job.views, "epochs": len(history),
        "loss": best.get("loss"), "held_out_loss": best.get("val_loss"),
    }  # fmt: skip
    tasks = [t.name for t in job.tasks if t.name in metrics]
    return found | dict(job.student.search) | ({"tasks": lines(metrics, tasks)} if tasks else {})

"""Teach a small network what any refs know: backbones, deltas, merges or folded models, of one task or of many."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import knobs, parallel, talk
from vtzoo.artifact import open_ref, store_model
from vtzoo.crops import Crops
from vtzoo.devices import accelerator
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.faculty import School, lessons_of
from vtzoo.fit import Plan, checkpoint_path, fit
from vtzoo.grading import cost, graded, lines
from vtzoo.lessons import Course, prepared
from vtzoo.losses._outputs import Outputs, Shapes
from vtzoo.objective import Objective, Term, needs_of, read
from vtzoo.outputs import check_parts
from vtzoo.pupil import Pupil
from vtzoo.recipe import Recipe, facts_of
from vtzoo.results import Distilled
from vtzoo.score import logits_of
from vtzoo.spec import Task
from vtzoo.student import SLIM, Giver, Student, build_student
from vtzoo.targets import Lesson, compared, together
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
ALONE = "hard[weight=0]"
"""The true labels and nothing else: what the same student learns without a teacher."""


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
        return [lessons, self.views, facts_of(self.recipe), self.student.card.json(), self.student.start]


def distill(
    *, teachers: Sequence[str], student: str, data: str | Mapping[str, str], loss: str = "kd", name: str, task: str | None = None,
    zoo: Zoo | None = None, recipe: Mapping[str, Any] | None = None, resume: bool = False, skip_bad: bool = False, views: int = 4,
    teacher_size: int | None = None, baseline: bool = False, check: int = 0, init: str | None = None, init_from: str | None = None,
) -> Distilled:  # fmt: skip
    """Train a student on its teachers' answers and keep it in the zoo as a plain model, with a classifier for each task.

    Args:
        teachers: refs; several of one task are averaged (logits) or compared with in turn (features, maps). A merge teaches all its tasks.
        student: a backbone's or model's name or a tagged timm name ("resnet18.a1_in1k"), which starts from its own weights; or
            a bare timm architecture, from random ones. Arguments may follow: "vit_tiny_patch16_224[depth=8,pretrained=false]". Or
            "slim[macs=0.5]": a smaller network made of the first teacher, or of `init_from`.
        data: images, of several tasks as {task: images}; any folder tree for a loss that needs no labels.
        loss: "kd[temperature=4]", or a sum: "kd+0.5*feature".
        name: what to call the student.
        task: whose head teaches; unless given, the one whose classes are the data's (none for a loss without logits).
        zoo: where to keep it; what teachers answered is kept in its cache.
        recipe: `vtzoo.recipe.Recipe`; `image_size` is the student's, `augment`, `crop_area` and `mixup` say what both sides see.
        resume: go on from this name's checkpoint.
        skip_bad: leave out broken images.
        views: crops of each image, shown in turn; 0, with cache=off alone, shows new ones in each epoch.
        teacher_size: side in pixels at which bare convolutional teachers look; their own unless given.
        baseline: also train the same student for as long on the labels alone, to compare.
        check: ask the teachers again for so many of the kept answers, and compare.
        init: how the student gets its first weights from another network, "weight-selection", "net2net"; see `vtzoo.inits`.
        init_from: which; the first teacher unless given.

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
    settings = _recipe(recipe or {})
    terms, given = read(loss), {"": data} if isinstance(data, str) else dict(data)
    _check_asked(settings, terms, views, teacher_size, check)
    school = School(
        teachers=[open_ref(t, zoo) for t in teachers], crops=_crops(settings), needs=needs_of(terms), recipe=settings, pixels=teacher_size,
        skip_bad=skip_bad,
    )  # fmt: skip
    if baseline and not school.labelled:
        raise UsageError(
            "without labels the student can't learn alone", "leave --baseline out, or use a loss on logits"
        )
    way = _way(student, init, init_from)
    lessons = lessons_of(school, given, task)
    giver = _giver(zoo, way, init_from, lessons) if way else None
    job = _job(zoo, name, school, lessons, given, student, giver, terms, views)
    return _taught(job, resume=resume, baseline=baseline, check=check)


def _way(student: str, init: str | None, ref: str | None) -> str | None:
    """How the student gets its first weights from another network, if it does."""
    slim = student.partition("[")[0] == SLIM
    if slim and init:
        raise UsageError("a slimmed student has its first weights already", "leave --init out")
    if ref and not init and not slim:
        raise UsageError("--init-from says whose weights, and not how", "add --init weight-selection (see vtzoo inits)")
    return student if slim else init


def _giver(zoo: Zoo, way: str, ref: str | None, lessons: Sequence[Lesson]) -> Giver:
    """Who gives the student its first weights: a head with them, where one task alone is learned and it has that."""
    artifact = open_ref(ref, zoo) if ref else lessons[0].teachers[0].artifact
    names = [t.name for t in artifact.tasks if t.name == lessons[0].name and t.classes == lessons[0].classes]
    return Giver(way, artifact, names[0] if len(lessons) == 1 and names else "" if artifact.tasks else None)


def _built(zoo: Zoo, text: str, lessons: Sequence[Lesson], recipe: Recipe, giver: Giver | None) -> Student:
    """A fresh student, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    if giver and giver.way == text:
        return giver.slim([n.images for n in lessons], recipe.image_size)
    made = build_student(text, zoo, len(lessons[0].classes), recipe.image_size)
    return giver.give(made) if giver else made


def _job(
    zoo: Zoo, name: str, school: School, lessons: Sequence[Lesson], data: Mapping[str, str], student: str, giver: Giver | None,
    terms: Sequence[Term], views: int,
) -> _Job:  # fmt: skip
    """The student built, and all that is asked of it."""
    recipe = school.recipe
    return _Job(
        zoo=zoo, name=name, student=_built(zoo, student, lessons, recipe, giver), student_text=student, giver=giver, lessons=lessons,
        recipe=recipe, terms=terms, views=school.crops.distinct(views), data=dict(zip([n.name for n in lessons], data.values(), strict=True)),
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
    if recipe.augment == "strong":
        raise UsageError("augment=strong shows each side something else", "use augment=crop, flip or none")
    return Crops(augment=recipe.augment, area=recipe.crop_area or Crops().area, mixup=recipe.mixup)


def _taught(job: _Job, *, resume: bool, baseline: bool, check: int) -> Distilled:
    """Prepare, train, measure, keep."""
    pupil = _pupil(job, job.student)
    online = _online(job.recipe, job.terms)
    if online and job.recipe.cache != "off":
        talk.say("this loss compares maps, which are not kept: the teachers answer in every step")
    folder = None if online else job.zoo.root / ".vtzoo" / "cache" / "targets"
    shape = job.student.card.preprocess
    course, objective = prepared(job.lessons, pupil, job.terms, shape, job.recipe, job.views, folder)
    checks = [compared(answers, job.views, check) for answers in course.kept] if check else []
    checkpoint = checkpoint_path(job.zoo.root, job.name, "student")
    history = _fit(job, course, objective, pupil, checkpoint, resume=resume)
    alone = _alone(job, course, resume=resume) if baseline else None
    metrics = _measured(job, pupil, alone)
    made = _keep(job, pupil, history, metrics, checks)
    for kind in ("student", "alone"):
        checkpoint_path(job.zoo.root, job.name, kind).unlink(missing_ok=True)
    return made


def _pupil(job: _Job, student: Student) -> Pupil:
    """The student with its classifiers, seen to show what the loss looks at.

    Raises:
        Mismatch: it doesn't.
    """
    pupil = Pupil(student.model, [len(n.classes) for n in job.lessons if n.classes])
    needs = needs_of(job.terms)
    if "token" in needs:
        train: Any = getattr(pupil.trunk, "set_distilled_training", None)
        if train is None:
            raise Mismatch(
                f"{student.card.name} has no distillation token, and this loss teaches one",
                "use a student such as deit_tiny_distilled_patch16_224, or --loss hard",
            )
        train(enable=True)
    if pupil.places or needs - {"logits"}:
        with pupil.at(0) if pupil.places else nullcontext():
            check_parts(pupil.trunk, student.card.preprocess.input_size, student.card.name)
    return pupil


def _fit(
    job: _Job, course: Course, objective: Objective, pupil: Pupil, checkpoint: Path, *, resume: bool
) -> list[dict[str, Any]]:
    """Train one student by one objective."""
    what = [*job.facts, [t.facts for t in objective.terms]]
    plan = Plan(
        model=pupil, loss=lambda model, batch: course.loss(_as_pupil(model), objective, batch), batches=course.batches, steps=course.steps,
        recipe=job.recipe, validate=lambda model: course.validate(model, objective), extra=objective if len(objective.bridges) + len(objective.standards) else None,
        checkpoint=checkpoint, key=hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(),
    )  # fmt: skip
    return fit(plan, resume=resume)


def _as_pupil(model: nn.Module) -> Pupil:
    assert isinstance(model, Pupil)
    return model


def _alone(job: _Job, course: Course, *, resume: bool) -> Pupil:
    """The same student after as many steps on the labels alone."""
    talk.say(f"{job.name}: the same student without a teacher")
    again = _built(job.zoo, job.student_text, job.lessons, job.recipe, job.giver)
    pupil, terms = Pupil(again.model, [len(n.classes) for n in job.lessons]), read(ALONE)
    objective = Objective(terms, Shapes(), {}, {})
    checkpoint = checkpoint_path(job.zoo.root, job.name, "alone")
    _fit(job, course, objective, pupil, checkpoint, resume=resume and checkpoint.is_file())
    return pupil


def _measured(job: _Job, pupil: Pupil, alone: Pupil | None) -> dict[str, Any]:
    """Student, teachers and the student without a teacher on each task's test images; nothing where there are none with labels."""
    found: dict[str, Any] = {}
    for number, lesson in enumerate(n for n in job.lessons if n.classes):
        images, split = _held(job, lesson)
        if images is None:
            continue
        theirs, labels = _teachers(lesson, images)
        own, taught = graded(_logits(pupil, number, images, job), theirs, labels)
        found[lesson.name] = {"split": split, **own}
        found[f"{lesson.name} (teacher)"] = taught
        if alone is not None:
            found[f"{lesson.name} (no teacher)"] = graded(_logits(alone, number, images, job), theirs, labels)[0]
    return found


def _held(job: _Job, lesson: Lesson) -> tuple[D.Images | None, str]:
    """The images on which a task is measured."""
    splits: tuple[D.Split, ...] = ("test", "val")
    for split in splits:
        with suppress(Mismatch, NotFound, UsageError):
            return D.open_data(job.data[lesson.name], split=split, skip_bad=job.skip_bad).aligned(lesson.classes), split
    return None, ""


def _logits(pupil: Pupil, number: int, images: D.Images, job: _Job) -> Tensor:
    with pupil.at(number) as trunk:
        return logits_of(
            trunk, D.loader(images, D.transforms(job.student.card.preprocess, train=False), batch_size=64)
        )[0]


def _teachers(lesson: Lesson, images: D.Images) -> tuple[Tensor, Tensor]:
    """Logits of a task's teachers together, and labels."""
    answers: list[Outputs] = []
    labels = torch.empty(0)
    for teacher in lesson.teachers:
        plain = D.transforms(teacher.preprocess, train=False)
        logits, labels = logits_of(teacher.live.model, D.loader(images, plain, batch_size=64))
        answers.append(Outputs(logits))
    logits = together(answers)[0].logits
    assert logits is not None
    return logits, labels


def _keep(
    job: _Job, pupil: Pupil, history: list[dict[str, Any]], metrics: dict[str, Any], checks: list[dict[str, Any]]
) -> Distilled:
    """Put the student in the zoo."""
    tasks, card = job.tasks, job.student.card
    licenses = sorted({t.card.license for n in job.lessons for t in n.teachers if t.card.license})
    report: dict[str, Any] = _report(job, pupil, history, metrics) | ({"check": checks} if checks else {})
    used = {k: v for k, v in facts_of(job.recipe).items() if k not in UNUSED}
    lineage = {
        "verb": "distill", "loss": [t.facts for t in job.terms], "recipe": used, "student": {"from": card.name, "start": job.student.start},
        "teachers": list(dict.fromkeys(t.digest for n in job.lessons for t in n.teachers)), "licenses": licenses, "views": job.views,
        "lessons": [_lineage(n) for n in job.lessons],
    }  # fmt: skip
    held = report["held_out_loss"]
    shown = {t.name: {k: metrics[t.name][k] for k in ("top1", "retention")} for t in tasks if t.name in metrics}
    kept = shown[tasks[0].name] if len(tasks) == 1 and shown else shown
    several = len(tasks) > 1
    digest = store_model(
        job.zoo, job.name, pupil.trunk.eval(), card, kind="student", tasks=tasks, heads=pupil.classifiers([t.name for t in tasks]) if several else None,
        facts={"metrics": kept or {"held_out_loss": round(held or 0.0, 4)}, "lineage": lineage},
    )  # fmt: skip
    talk.say(f"{job.name}: {report['params']:,} parameters, teachers {report['teacher_params']:,}")
    if licenses:
        talk.say(f"its teachers' licences: {', '.join(licenses)}")
    return Distilled(ref=job.name, path=str(job.zoo.object(digest)), metrics=metrics, report=report)


def _lineage(lesson: Lesson) -> dict[str, Any]:
    """What a student's lineage keeps of a lesson."""
    return {
        "task": lesson.name, "data": f"sha256:{lesson.images.digest}", "images": len(lesson.images),
        "teachers": [t.digest for t in lesson.teachers], "teacher_tasks": [t.task.name if t.task else "" for t in lesson.teachers],
    }  # fmt: skip


def _report(job: _Job, pupil: Pupil, history: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
    """What a student cost, and what it keeps."""
    teachers = {t.digest: t for n in job.lessons for t in n.teachers}
    own = cost(pupil, job.student.card.preprocess.input_size)
    theirs = [cost(t.live.model, t.preprocess.input_size) for t in teachers.values()]
    found: dict[str, Any] = {
        "start": job.student.start, **own, "teacher_params": sum(c["params"] for c in theirs), "teacher_macs": sum(c["macs"] for c in theirs),
        "images": sum(len(n.images) for n in job.lessons), "views": job.views, "epochs": len(history),
        "loss": history[-1]["loss"] if history else None, "held_out_loss": history[-1].get("val_loss") if history else None,
    }  # fmt: skip
    tasks = [t.name for t in job.tasks if t.name in metrics]
    return found | ({"tasks": lines(metrics, tasks)} if tasks else {})

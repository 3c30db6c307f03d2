"""How a student does beside its teachers: what it keeps of their accuracy, how often it says the same, on the same images."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtzoo import data as D
from vtzoo import talk
from vtzoo.crops import BATCH
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.installed import head_state
from vtzoo.losses._outputs import Outputs, given
from vtzoo.probing import work
from vtzoo.pupil import Pupil
from vtzoo.score import brief, logits_of, measure
from vtzoo.spec import Preprocess
from vtzoo.targets import Lesson, together

TEACHER, NO_TEACHER = "teacher", "no teacher"


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What students are measured on.

    Attributes:
        lessons: one a task.
        data: images of each, by task.
        preprocess: the students'.
        skip_bad: leave out broken images.
    """

    lessons: Sequence[Lesson]
    data: Mapping[str, str]
    preprocess: Preprocess
    skip_bad: bool = False


def measured(exam: Exam, pupils: Mapping[str, Pupil]) -> dict[str, dict[str, Any]]:
    """Students and teachers on each task's test images, on validation images where there are none; nothing where there are neither.

    Args:
        exam: the images.
        pupils: by what is said of them, "" for the student itself.

    Returns:
        What `graded` gives, by task: "fashion", "fashion (teacher)", "fashion (no teacher)".
    """
    found: dict[str, dict[str, Any]] = {}
    for number, lesson in enumerate(n for n in exam.lessons if n.classes):
        images, split = _held(exam, lesson)
        if images is None:
            talk.say(f"{lesson.name}: no test or validation images of its classes, so nothing is measured")
            continue
        theirs, labels = _teachers(lesson, images)
        for kind, pupil in pupils.items():
            own, taught = graded(_logits(pupil, number, images, exam.preprocess), theirs, labels)
            found[f"{lesson.name} ({kind})" if kind else lesson.name] = {"split": split, **own}
            found[f"{lesson.name} ({TEACHER})"] = taught
    return found


def _held(exam: Exam, lesson: Lesson) -> tuple[D.Images | None, str]:
    """The images on which a task is measured."""
    splits: tuple[D.Split, ...] = ("test", "val")
    for split in splits:
        with suppress(Mismatch, NotFound, UsageError):
            return D.open_data(exam.data[lesson.name], split=split, skip_bad=exam.skip_bad).aligned(
                lesson.classes
            ), split
    return None, ""


def _logits(pupil: Pupil, number: int, images: D.Images, shape: Preprocess) -> Tensor:
    with pupil.at(number) as trunk:
        return logits_of(trunk, D.loader(images, D.transforms(shape, train=False), batch_size=BATCH))[0]


def _teachers(lesson: Lesson, images: D.Images) -> tuple[Tensor, Tensor]:
    """Logits of a task's teachers together, and labels."""
    answers: list[Outputs] = []
    labels = torch.empty(0)
    for teacher in lesson.teachers:
        plain = D.transforms(teacher.preprocess, train=False)
        logits, labels = logits_of(teacher.live.model, D.loader(images, plain, batch_size=BATCH))
        answers.append(Outputs(logits))
    return given(together(answers)[0].logits), labels


def effort(lessons: Sequence[Lesson]) -> tuple[int, int]:
    """Parameters of all teachers, each network counted once and with the classifiers of all that it teaches; and multiply-adds of an image in each."""
    params, macs = 0, 0
    seen = dict[str, set[str]]()
    for teacher in (t for lesson in lessons for t in lesson.teachers):
        task, model = teacher.task.name if teacher.task else "", teacher.live.model
        if teacher.known not in seen:
            own = work(model, teacher.preprocess.input_size)
            params, macs = params + own[0], macs + own[1]
        elif task not in seen[teacher.known]:
            params += sum(t.numel() for t in head_state(model).values())
        seen.setdefault(teacher.known, set()).add(task)
    return params, macs


def graded(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is measured of a student and of its teachers on the same images.

    Beside what `vtzoo eval` measures the student has `retention`, its top-1 over theirs; `agreement`, the share of images on which both
    decide the same (Stanton et al. 2021, arXiv:2106.05945); and `kl`, KL(teacher || student) in nats, mean over the images.

    Args:
        student: logits [n, classes].
        teacher: the same of the teachers together.
        labels: [n].
    """
    ours, theirs = brief(measure(student, labels)), brief(measure(teacher, labels))
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    apart = F.kl_div(student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="batchmean", log_target=True)  # fmt: skip
    kept = ours["top1"] / theirs["top1"] if theirs["top1"] else None
    more = {"retention": kept, "agreement": same, "kl": apart.item()}
    return {**ours, **{k: v if v is None else round(v, 4) for k, v in more.items()}}, theirs


def lines(metrics: Mapping[str, Mapping[str, Any]], tasks: list[str]) -> list[dict[str, Any]]:
    """A report's table: a line for each task."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        own = metrics[task]
        line = {
            "task": task,
            "images": own["images"],
            "top1": own["top1"],
            "teacher": metrics[f"{task} ({TEACHER})"]["top1"],
        }
        if alone := metrics.get(f"{task} ({NO_TEACHER})"):
            line["no_teacher"] = alone["top1"]
        found.append(line | {k: own[k] for k in ("retention", "agreement", "kl", "ece")})
    return found

"""Who teaches what: refs and images become lessons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vtzoo import data as D
from vtzoo.artifact import HEADS, Artifact, described
from vtzoo.backbone import sized
from vtzoo.bases import weights_path
from vtzoo.crops import Crops
from vtzoo.devices import accelerator
from vtzoo.errors import Mismatch, NotFound, UsageError, did_you_mean
from vtzoo.files import sha256
from vtzoo.recipe import Recipe
from vtzoo.spec import Preprocess, Task
from vtzoo.targets import Lesson, Teacher


@dataclass(frozen=True, kw_only=True)
class School:
    """What all lessons share.

    Attributes:
        teachers: who may teach.
        crops: how views are drawn.
        needs: what the loss looks at.
        recipe: images of each task and the seed by which they are chosen, precision, workers, device.
        pixels: side at which teachers look; their own unless given.
        skip_bad: leave out broken images.
    """

    teachers: Sequence[Artifact]
    crops: Crops
    needs: frozenset[str]
    recipe: Recipe
    pixels: int | None = None
    skip_bad: bool = False

    @property
    def labelled(self) -> bool:
        """Whether the student learns classes."""
        return bool({"logits", "token"} & self.needs)


def lessons_of(school: School, data: Mapping[str, str], task: str | None) -> list[Lesson]:
    """One lesson for each of the data.

    Args:
        school: what they share.
        data: images by the task that they are of; "" where the images' classes say which that is.
        task: whose head teaches, where that can't be told.

    Raises:
        Mismatch: nobody knows the images' classes, or teachers count them differently.
        NotFound: no teacher has the task.
        UsageError: several tasks would fit, or a teacher has nothing to teach.
    """
    if task is not None and len(data) > 1:
        raise UsageError("--task is for images of one task", "write --data TASK=DATA for each")
    for artifact in school.teachers if task is not None else ():
        if task not in {t.name for t in artifact.tasks}:
            raise NotFound(f"{artifact.ref} has no task '{task}'", "leave --task out, or choose another teacher")
    found = [_lesson(school, name or task, images) for name, images in data.items()]
    taught = {id(t.artifact) for lesson in found for t in lesson.teachers}
    if idle := [a.ref for a in school.teachers if id(a) not in taught]:
        raise UsageError(f"{idle[0]} has none of the tasks {', '.join(n.name for n in found)}", "leave it out, or add its images: --data TASK=DATA")  # fmt: skip
    return found


def _lesson(school: School, name: str | None, data: str) -> Lesson:
    images = D.open_data(data, split="train", skip_bad=school.skip_bad, labelled=school.labelled)
    classes = images.classes if school.labelled else None
    many = name is not None and len(school.teachers) > 1
    able = [a for a in school.teachers if not many or _knows(a, name, classes)]
    if not able:
        known = sorted({t.name for a in school.teachers for t in a.tasks})
        why = f"has the classes of {data} in task '{name}'" if name in known else f"has a task '{name}'"
        raise NotFound(f"no teacher {why}; they have {', '.join(known) or 'none'}", did_you_mean(name or "", known) or "write --data TASK=DATA")  # fmt: skip
    teachers = [_teacher(a, name, classes, school.pixels) for a in able]
    orders = {t.task.classes for t in teachers if t.task} if school.labelled else set[tuple[str, ...]]()
    if len(orders) > 1:
        raise Mismatch("the teachers count the same classes in different orders", "distil from one of them")
    images = images.aligned(*orders) if orders else images
    recipe = school.recipe
    task = name or (teachers[0].task.name if teachers[0].task else "")
    return Lesson(
        name=task, images=images.limit(recipe.limit), teachers=teachers, crops=_framed(school.crops, teachers[0].preprocess), needs=school.needs,
        precision=recipe.precision, workers=recipe.workers, device=str(accelerator(recipe).device),
    )  # fmt: skip


def _framed(crops: Crops, shape: Preprocess) -> Crops:
    """Views whose central part is what the first teacher is shown: of its input's shape, or the whole picture."""
    _, height, width = shape.input_size
    return replace(crops, ratio=0.0 if shape.crop_mode == "squash" else width / height)


def _knows(artifact: Artifact, name: str | None, classes: Sequence[str] | None) -> bool:
    """Whether it can teach the task of this name; where features alone are taught everyone can."""
    if classes is None:
        return True
    return any(t.name == name and sorted(t.classes) == sorted(classes) for t in artifact.tasks)


def _teacher(artifact: Artifact, asked: str | None, classes: Sequence[str] | None, pixels: int | None) -> Teacher:
    """One of the teachers of a task.

    Raises:
        Mismatch: it has no head, or one for other classes.
        NotFound: of its several tasks none has the name.
        UsageError: it can't look at this size.
    """
    task = _task(artifact, asked, classes)
    if classes is not None:
        if task is None:
            raise Mismatch(f"{artifact.ref} has no head, and this loss needs logits", "use --loss feature, or a delta as teacher")  # fmt: skip
        if task.multilabel:
            raise Mismatch(
                f"task '{task.name}' gives several labels to an image, and losses on logits compare one class",
                "use --loss feature",
            )
        if sorted(task.classes) != sorted(classes):
            raise Mismatch(
                f"the data's classes are not those of task '{task.name}'",
                "use the task's own images, or --loss feature",
            )
    card = artifact.card or (artifact.delta.backbone if artifact.delta else described(artifact.files or {})[0])
    looking, args = sized(replace(card, preprocess=task.preprocess if task else card.preprocess), pixels)
    if args:
        raise UsageError(f"{card.name} can look at its own size only", "leave --teacher-size out")
    return Teacher(artifact=artifact, digests=_digests(artifact), card=card, task=task, preprocess=looking.preprocess)


def _task(artifact: Artifact, asked: str | None, classes: Sequence[str] | None) -> Task | None:
    """Whose head answers; `classes` are the data's, None for a loss that needs no logits."""
    tasks = artifact.tasks
    named = [t for t in tasks if t.name == asked]
    if named:
        return named[0]
    if len(tasks) < 2:
        return tasks[0] if tasks else None
    if classes is None:
        return None
    if asked:
        raise NotFound(f"{artifact.ref} has no task '{asked}'", did_you_mean(asked, [t.name for t in tasks]) or f"it has {', '.join(t.name for t in tasks)}")  # fmt: skip
    fitting = [t for t in tasks if sorted(t.classes) == sorted(classes)]
    if len(fitting) > 1:
        raise UsageError(
            f"{artifact.ref} has {len(fitting)} tasks with the data's classes: {', '.join(t.name for t in fitting)}",
            f"choose one with --task {fitting[0].name}",
        )
    if not fitting:
        known = ", ".join(t.name for t in tasks)
        raise Mismatch(f"the data's classes are those of no task of {artifact.ref} ({known})", "use a task's own images, or --loss feature")  # fmt: skip
    return fitting[0]


def _digests(artifact: Artifact) -> tuple[str, ...]:
    """What stands for a teacher: its file's sha256 and that of its heads' file, a bare backbone's fingerprint where that is known."""
    if (card := artifact.card) is not None:
        return (card.fingerprint or sha256(weights_path(card, artifact.zoo)),)
    heads = (artifact.files or {}).get(HEADS)
    return (artifact.digest, sha256(heads)) if heads else (artifact.digest,)

"""Measure any ref on labelled images; a merge beside the deltas it was made from."""

from typing import Any

from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import Artifact, go_live, open_ref
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.results import Evaluated
from vtzoo.score import logits_of, measure
from vtzoo.test_time import Config, asked, tuner
from vtzoo.zoo import Zoo


def evaluate(
    *, ref: str, data: str, task: str | None = None, zoo: Zoo | None = None, batch_size: int = 64, skip_bad: bool = False,
    split: D.Split = "test", test_time: str | None = None,
) -> Evaluated:  # fmt: skip
    """One pass over the test split (the validation split where there is no test); which one, and how much of it, is said.

    Args:
        ref: a delta, merge, folded model, student or exported file.
        data: of the task; its class folders, or the labels of its table, must be the task's classes.
        task: whose head, where there are several.
        zoo: where to look.
        batch_size: images per batch.
        skip_bad: leave out broken images.
        split: which part of the data.
        test_time: what is tuned on each image alone, such as "tpt[views=64]"; see `vtzoo.test_time`.

    Returns:
        `metrics[task]` for this ref, with the `split` and how many `images` it was, and, for a merge,
        `metrics["PARENT (alone)"]` for the parent that brought the task.

    Raises:
        Mismatch: the data's classes are not the task's.
        UsageError: the ref has no task, or nothing that can be tuned.
    """
    zoo = zoo or Zoo.find()
    artifact, tuning = open_ref(ref, zoo, exports=True), asked(test_time) if test_time else None
    if artifact.card is not None:
        raise UsageError(
            f"'{artifact.ref}' is a bare backbone without a task's head", "train one: vtzoo train --method linear …"
        )
    images, split = _images(data, split, skip_bad=skip_bad)
    talk.say(f"{artifact.ref}: {len(images)} images of the {split} split{_chosen(images)}")
    name, found = _one(artifact, images, task, batch_size, tuning)
    metrics = {name: {**({"test_time": test_time} if test_time else {}), **found}}
    if parent := _parent(artifact, name):
        metrics[f"{parent.ref} (alone)"] = _one(parent, images, name, batch_size)[1]
    shown = {k: {"split": split, **m} for k, m in metrics.items()}
    return Evaluated(ref=artifact.ref, path=str(artifact.path), metrics=shown)


def _images(data: str, split: D.Split, *, skip_bad: bool) -> tuple[D.Images, D.Split]:
    try:
        return D.open_data(data, split=split, skip_bad=skip_bad, several=True), split
    except NotFound:
        if split != "test":
            raise
        return D.open_data(data, split="val", skip_bad=skip_bad, several=True), "val"


def _chosen(images: D.Images) -> str:
    """What to add where no folders say which images are the split's: their paths start with a class."""
    folder, below, _ = images.paths[0].partition("/")
    alone = folder in images.classes or not below
    return " (there are no split folders: a hash of each name chose them)" if alone else ""


def _one(
    artifact: Artifact, images: D.Images, task: str | None, batch_size: int, tuning: Config | None = None
) -> tuple[str, dict[str, Any]]:
    tuned = tuner(artifact, task, tuning) if tuning else None
    live = tuned.live if tuned else go_live(artifact, task)
    if live.task is None:
        raise UsageError(f"'{artifact.ref}' has no task's head", "choose a delta or a model with classes")
    if set(images.classes) - set(live.task.classes):
        lacking = sorted(set(live.task.classes) ^ set(images.classes))
        raise Mismatch(
            f"the data's {len(images.classes)} classes are not the {len(live.task.classes)} of task '{live.task.name}' ({', '.join(lacking[:3])})",
            "choose the task's own data, or another --task",
        )
    if bool(images.several) != live.task.multilabel:
        has, task_has = ("several labels", "one") if images.several else ("one class", "several")
        raise Mismatch(
            f"the data's images have {has} each, those of task '{live.task.name}' {task_has}",
            "choose the task's own data",
        )
    images = images.aligned(live.task.classes)
    if tuned:
        return live.task.name, measure(*tuned.over(images))
    transform = D.transforms(live.preprocess, train=False)
    return live.task.name, measure(*logits_of(live.model, D.loader(images, transform, batch_size=batch_size)))


def _parent(artifact: Artifact, task: str) -> Artifact | None:
    """The zoo's entry of the delta that brought a merge this task."""
    if artifact.delta is None or artifact.delta.lineage.get("verb") != "merge":
        return None
    parents = {p.removeprefix("sha256:") for p in artifact.delta.lineage["parents"]}
    for entry in artifact.zoo.entries("deltas"):
        digest = entry.facts.get("digest", "").removeprefix("sha256:")
        if digest in parents and task in entry.facts.get("tasks", ()):
            return open_ref(entry.name, artifact.zoo)
    return None

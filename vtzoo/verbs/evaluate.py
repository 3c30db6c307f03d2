"""Measure any ref on labelled images; a merge beside the deltas it was made from."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import Artifact, Live, go_live, open_ref
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.portions import Which, harmonic, portion
from vtzoo.results import Evaluated
from vtzoo.score import logits_of, measure
from vtzoo.speech import named
from vtzoo.test_time import Config, asked, speaking, tuner
from vtzoo.vocabulary import Naming, of_names
from vtzoo.zoo import Zoo


@dataclass(frozen=True)
class _Way:
    """How images are looked at: so many at once, or each alone, with what is tuned on it."""

    batch_size: int
    tuning: Config | None


def evaluate(
    *, ref: str, data: str, task: str | None = None, zoo: Zoo | None = None, batch_size: int = 64, skip_bad: bool = False,
    split: D.Split = "test", classes: Which = "all", naming: Naming | None = None, base_to_new: bool = False,
    test_time: str | None = None,
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
        classes: all of them, or one half; see `vtzoo.portions`.
        naming: take the data's own classes, by their names, whatever the delta was trained for; a bare dual encoder does anyway.
        base_to_new: of a delta trained with classes=base, measure that half, then the other by names, and their harmonic mean.
        test_time: what is tuned on each image alone, such as "tpt[views=64]"; see `vtzoo.test_time`.

    Returns:
        `metrics[task]` for this ref, with the `split` and how many `images` it was, and, for a merge,
        `metrics["PARENT (alone)"]` for the parent that brought the task.

    Raises:
        Mismatch: the data's classes are not the task's.
        UsageError: a bare backbone without a text tower, classes are to be named and nothing here can, or nothing can be
            tuned.
    """
    zoo = zoo or Zoo.find()
    artifact, way = open_ref(ref, zoo, exports=True), _Way(batch_size, asked(test_time) if test_time else None)
    if artifact.card is not None and not artifact.card.model_args.get("text"):
        raise UsageError(
            f"'{artifact.ref}' is a bare backbone without a task's head", "train one: vtzoo train --method linear …"
        )
    if base_to_new and classes != "all":
        raise UsageError(
            f"both halves are measured, and classes={classes} names one", "leave --classes or --base-to-new out"
        )
    whole, split = _images(data, split, skip_bad=skip_bad)
    images = portion(whole, "base" if base_to_new else classes)
    talk.say(f"{artifact.ref}: {len(images)} images of the {split} split{_chosen(images)}")
    if naming is not None:
        named(whole.classes, naming.words)
    by_names, naming = naming is not None or artifact.card is not None, naming or Naming()
    look = partial(_named, naming=naming) if by_names else _one
    name, found = look(artifact, images, task, way)
    metrics = {name: {**({"test_time": test_time} if test_time else {}), **found}}
    if base_to_new:
        metrics |= _beyond(artifact, portion(whole, "new"), task, way, naming, found["top1"])
    if parent := _parent(artifact, name):
        metrics[f"{parent.ref} (alone)"] = look(parent, images, name, way)[1]
    shown = {k: {"split": split, **m} for k, m in metrics.items()}
    return Evaluated(ref=artifact.ref, path=str(artifact.path or ""), metrics=shown)


def _named(
    artifact: Artifact, images: D.Images, task: str | None, way: _Way, naming: Naming
) -> tuple[str, dict[str, Any]]:
    """Of the data's classes, by their names."""
    live = of_names(artifact, images.classes, naming, task)
    assert live.task is not None
    told = replace(live.task, multilabel=bool(images.several))
    return told.name, _measured(replace(live, task=told), images, way)


def _beyond(
    artifact: Artifact, images: D.Images, task: str | None, way: _Way, naming: Naming, base: float
) -> dict[str, dict[str, Any]]:
    """The classes that were not trained on, and the harmonic mean of both halves' top-1."""
    known = artifact.task(task)
    if known is not None and set(images.classes) & set(known.classes):
        raise Mismatch(
            f"'{artifact.ref}' knows the classes that are to be new to it", "train it with --set classes=base"
        )
    _, new = _named(artifact, images, task, way, naming)
    return {"new classes": new, "harmonic mean": {"top1": harmonic(base, new["top1"])}}


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


def _one(artifact: Artifact, images: D.Images, task: str | None, way: _Way) -> tuple[str, dict[str, Any]]:
    live = speaking(artifact, task) if way.tuning else go_live(artifact, task)
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
    return live.task.name, _measured(live, images, way)


def _measured(live: Live, images: D.Images, way: _Way) -> dict[str, Any]:
    assert live.task is not None
    images = images.aligned(live.task.classes)
    if way.tuning:
        return measure(*tuner(live, way.tuning).over(images))
    transform = D.transforms(live.preprocess, train=False)
    return measure(*logits_of(live.model, D.loader(images, transform, batch_size=way.batch_size)))


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

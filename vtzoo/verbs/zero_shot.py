"""Make a classifier of class names with a dual encoder's text tower, without training; measured where there are images."""

import time
from collections.abc import Mapping, Sequence

from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_sized
from vtzoo.delta import listed
from vtzoo.errors import NotFound, UsageError
from vtzoo.identity import CARD
from vtzoo.lineage import record
from vtzoo.live import extract, inject
from vtzoo.results import Trained
from vtzoo.score import brief, logits_of, measure
from vtzoo.spec import Task, check_labels
from vtzoo.speech import can_speak, spoken
from vtzoo.zoo import Zoo


def zero_shot(
    *, backbone: str, name: str, data: str | None = None, classes: Sequence[str] = (), words: Mapping[str, str] | None = None,
    templates: Sequence[str] = (), image_size: int | None = None, batch_size: int = 64, skip_bad: bool = False, zoo: Zoo | None = None,
) -> Trained:  # fmt: skip
    """Keep a zero-shot classifier as a delta: names, templates and the linear head that they make.

    Args:
        backbone: ref of a dual encoder.
        name: what to call the delta; the part before the last "/" names its task.
        data: images whose classes it is to know; val and test, where there are such, are measured.
        classes: their labels, where there are no images.
        words: names by label; a label with spaces unless given.
        templates: texts around them, each with one {}, or names of sets; "a photo of a {}." unless given.
        image_size: in pixels; the backbone's own unless given.
        batch_size: images per batch.
        skip_bad: leave out broken images.
        zoo: where to keep it.

    Raises:
        Conflict: the name exists.
        UsageError: the backbone has no text tower, both or neither of `data` and `classes` are given, or names are no good.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("deltas", name)
    if (data is None) == (not classes):
        raise UsageError("which classes?", "give --data DATA, or --classes cat,dog,…")
    card, started = resolved_card(backbone, zoo), (time.monotonic(), time.process_time())
    images = {} if data is None else _images(data, skip_bad=skip_bad)
    labels = next(iter(images.values())).classes if images else tuple(classes)
    check_labels(labels)
    card, model = build_sized(card, image_size, zoo=zoo, num_classes=len(labels))
    if not can_speak(model):
        raise UsageError(
            f"{card.name} has no text tower", "use a clip: backbone, such as clip:ViT-B-32.laion2b_s34b_b79k"
        )
    said, around = spoken(model, labels, words or {}, templates)
    several = any(i.several for i in images.values())
    task = Task(
        name=name.rpartition("/")[0] or name, classes=labels, preprocess=card.preprocess, multilabel=several,
        words=said, templates=around,
    )  # fmt: skip
    inject(model, "zero-shot")
    talk.say(f"{name}: {len(labels)} classes, {len(around)} templates")
    transform = D.transforms(card.preprocess, train=False)
    batches = {s: D.loader(i.aligned(labels), transform, batch_size=batch_size) for s, i in images.items()}
    metrics = {split: brief(measure(*logits_of(model, found))) for split, found in batches.items()}
    delta = extract(model, tasks=[task], backbone=getattr(model, CARD), metrics=metrics, lineage=record("zero-shot"))
    seconds, cpu = time.monotonic() - started[0], time.process_time() - started[1]
    digest = listed(delta, zoo, name, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)})
    return Trained(ref=name, path=str(zoo.object(digest)), metrics=metrics, digest=digest, method=delta.method)


def _images(data: str, *, skip_bad: bool) -> dict[str, D.Images]:
    """What there is of val and test images, by split.

    Raises:
        NotFound: neither.
    """
    found: dict[str, D.Images] = {}
    for split in D.SPLITS[1:]:
        try:
            found[split] = D.open_data(data, split=split, skip_bad=skip_bad, several=True)
        except NotFound:
            if split == D.SPLITS[-1] and not found:
                raise
    return found

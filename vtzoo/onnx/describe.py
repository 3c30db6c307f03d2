"""What an exported file says of itself, in its metadata: all that a program without vtzoo needs to use it, as JSON by key.

vtzoo.input     name, layout, dtype, size [channels, height, width], and `steps`: from a picture to the input, one after the other
vtzoo.classes   the labels in the order of the outputs
vtzoo.tasks     of a file of many tasks in place of classes, one after the other: number (what `task_id` holds), name, classes, multilabel,
                and where it comes from; vtzoo.padding is the logit of a class that a task doesn't have
vtzoo.task vtzoo.multilabel vtzoo.precision vtzoo.ref vtzoo.digest vtzoo.method vtzoo.folded vtzoo.parents
vtzoo.backbone vtzoo.fingerprint vtzoo.license vtzoo.versions
Image.*         ONNX's own words for images (docs/MetadataProps.md of ONNX)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtzoo import strict
from vtzoo.errors import Mismatch, NotFound
from vtzoo.spec import Preprocess, Task

SCHEMA = "1"
NEEDED = ("vtzoo.input", "vtzoo.classes")
PAD = -1e30
"""The logit of a class that a task doesn't have: never the largest, and 0 after softmax and sigmoid."""
INPUT, TASK_ID = "image", "task_id"
_RANGES = {(0.0, 1.0): "Normalized_0_1", (0.5, 0.5): "Normalized_1_1"}
"""ONNX's names for what a mean and a standard deviation, the same for all channels, make of pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """One exported file.

    Attributes:
        task: what its outputs mean; None where they are features.
        preprocess: how a picture becomes its input.
        embedded: whether the graph itself normalises: the input is then uint8 [n, h, w, 3], else float32 [n, 3, h, w].
        dynamic_size: whether it takes other heights and widths, too.
        tasks: those of a file of many, by number, with what is said of each; `task` is None then.
        facts: further keys, without `vtzoo.` before them.
    """

    task: Task | None
    preprocess: Preprocess
    embedded: bool = False
    dynamic_size: bool = False
    tasks: tuple[tuple[Task, Mapping[str, Any]], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def written(description: Description) -> dict[str, str]:
    """The metadata: texts, and JSON where a value is none."""
    shape, task = description.preprocess, description.task
    said = {
        "schema": SCHEMA,
        "task": task.name if task else "",
        "classes": list(task.classes) if task else [],
        "multilabel": bool(task and task.multilabel),
        "input": {
            "name": INPUT, **_layout(description), "size": list(shape.input_size), "dynamic_size": description.dynamic_size,
            "mean": list(shape.mean), "std": list(shape.std), "interpolation": shape.interpolation, "crop_pct": shape.crop_pct,
            "crop_mode": shape.crop_mode, "steps": steps(shape, embedded=description.embedded),
        },
        **_tasks(description), **description.facts,
    }  # fmt: skip
    return {f"vtzoo.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in said.items()} | _image(description)


def _tasks(description: Description) -> dict[str, Any]:
    if not description.tasks:
        return {}
    rows = [
        {"number": i, "name": t.name, "classes": list(t.classes), "multilabel": t.multilabel, **said}
        for i, (t, said) in enumerate(description.tasks)
    ]
    return {"tasks": rows, "padding": PAD}


def _layout(description: Description) -> dict[str, Any]:
    if description.embedded:
        return {"layout": "NHWC", "dtype": "uint8", "range": [0, 255]}
    return {"layout": "NCHW", "dtype": "float32", "range": [0, 1]}


def _image(description: Description) -> dict[str, str]:
    """ONNX's own keys; the range is left out where it has no word for it."""
    shape = description.preprocess
    same = (shape.mean[0], shape.std[0]) if len({*shape.mean}) == len({*shape.std}) == 1 else None
    kind = "NominalRange_0_255" if description.embedded else _RANGES.get(same) if same else None
    said = {"Image.BitmapPixelFormat": "Rgb8", "Image.ColorSpaceGamma": "SRGB"}
    return said | ({"Image.NominalPixelRange": kind} if kind else {})


def steps(shape: Preprocess, *, embedded: bool) -> list[dict[str, Any]]:
    """From a picture to the network's input, as timm's evaluation transform goes; sizes are [height, width] in pixels.

    A resize has one of `shorter_side` (the other side keeps the ratio, rounded down), `cover` and `within` (the ratio is kept, the
    picture is at least or at most that large, rounded to the nearest) and `to` (the ratio is not kept).
    """
    size = list(shape.input_size[1:])
    larger = [math.floor(s / shape.crop_pct) for s in size]
    how = {"interpolation": shape.interpolation, "antialias": True}
    decode = {"op": "decode", "mode": "RGB", "orientation": "upright", "transparency": "over white"}
    if shape.crop_mode == "squash":
        resize = {"op": "resize", "to": larger, **how}
    elif shape.crop_mode == "border":
        resize = {"op": "resize", "within": larger, **how}
    elif larger[0] == larger[1]:
        resize = {"op": "resize", "shorter_side": larger[0], **how}
    else:
        resize = {"op": "resize", "cover": larger, **how}
    crop: dict[str, Any] = {"op": "center_crop", "size": size}
    if shape.crop_mode == "border":
        crop["fill"] = [round(255 * m) for m in shape.mean]
    if embedded:
        return [decode, resize, crop]
    last = {"op": "normalize", "mean": list(shape.mean), "std": list(shape.std)}
    return [decode, resize, crop, {"op": "divide", "by": 255}, last, {"op": "transpose", "to": "CHW"}]


def read(metadata: Mapping[str, str], where: str) -> Description:
    """What `written` wrote.

    Raises:
        Mismatch: it is not such metadata, and what is missing or wrong.
    """
    hint = "use a file that vtzoo export wrote"
    if missing := [k for k in NEEDED if not metadata.get(k)]:
        raise Mismatch(f"{where} doesn't say how to use it: its metadata lacks {' and '.join(missing)}", hint)
    try:
        shown = strict.loads(metadata["vtzoo.input"])
        shape = Preprocess.of({**shown, "input_size": [int(s) for s in shown["size"]]})
        classes = tuple(str(c) for c in strict.loads(metadata["vtzoo.classes"]))
        several = bool(strict.loads(metadata.get("vtzoo.multilabel", "false")))
        embedded = (shown["layout"], shown["dtype"]) == ("NHWC", "uint8")
        tasks = tuple((_task(t, shape), t) for t in strict.loads(metadata.get("vtzoo.tasks", "[]")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mismatch(f"{where} has metadata that can't be read: {type(error).__name__} {error}", hint) from error
    name = metadata.get("vtzoo.task") or "task"
    task = Task(name=name, classes=classes, preprocess=shape, multilabel=several) if classes else None
    facts = {k.removeprefix("vtzoo."): v for k, v in metadata.items()}
    dynamic = bool(shown.get("dynamic_size"))
    return Description(task=task, preprocess=shape, embedded=embedded, dynamic_size=dynamic, tasks=tasks, facts=facts)


def check_task(description: Description, task: str | None, where: str) -> None:
    """Refuse another task than the file's own.

    Raises:
        NotFound: says whose it is.
    """
    one = description.task
    if task and (one is None or one.name != task):
        raise NotFound(f"{where} has no task '{task}'", f"leave --task out: its task is '{one.name if one else ''}'")


def _task(said: Mapping[str, Any], shape: Preprocess) -> Task:
    classes = tuple(str(c) for c in said["classes"])
    return Task(name=str(said["name"]), classes=classes, preprocess=shape, multilabel=bool(said["multilabel"]))

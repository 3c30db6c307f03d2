"""Classify image files with any ref."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtzoo import data as D
from vtzoo._images import Folder
from vtzoo.artifact import go_live, open_ref
from vtzoo.errors import NotFound, UsageError
from vtzoo.results import Predicted
from vtzoo.test_time import asked, speaking, tuner
from vtzoo.zoo import Zoo

SEVERAL = 0.5
"""What a label's probability must exceed where an image may bear several."""


def predict(
    *,
    ref: str,
    images: str | Path | Sequence[str | Path],
    task: str | None = None,
    top: int = 5,
    zoo: Zoo | None = None,
    test_time: str | None = None,
) -> Predicted:
    """The most probable classes of each image; where an image may bear several labels, those more probable than not.

    Args:
        ref: a delta, merge, folded model, student or exported file.
        images: files, and folders, which stand for all images below them by name; one path or several.
        task: whose head, where there are several.
        top: how many classes.
        zoo: where to look.
        test_time: what is tuned on each image alone, such as "tpt[views=64]"; see `vtzoo.test_time`.

    Raises:
        NotFound: a file is missing.
        UsageError: a folder without images, no class wanted, or nothing that can be tuned.
        Corrupt: a file is no image.
    """
    zoo = zoo or Zoo.find()
    if top < 1:
        raise UsageError(f"top is {top}", "name at least one class: --top 1")
    paths = [p for given in ([images] if isinstance(images, str | Path) else images) for p in _files(Path(given))]
    artifact = open_ref(ref, zoo, exports=True)
    tuning = asked(test_time) if test_time else None
    live = speaking(artifact, task) if tuning else go_live(artifact, task)
    if live.task is None:
        raise UsageError(f"'{artifact.ref}' has no task's head", "choose a delta or a model with classes")
    tuned = tuner(live, tuning) if tuning else None
    transform = D.transforms(live.preprocess, train=False)
    found: list[dict[str, Any]] = []
    with torch.inference_mode(mode=tuned is None):
        for path in paths:
            image = D.open_image(path)
            logits = tuned(image) if tuned else live.model(transform(image)[None]).float()[0]
            chances = logits.sigmoid() if live.task.multilabel else logits.softmax(-1)
            best = chances.topk(min(top, len(live.task.classes)))
            ranked = [
                {"class": live.task.classes[i], "probability": round(p, 6)}
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if p > SEVERAL or not live.task.multilabel
            ]
            found.append({"image": str(path), "task": live.task.name, "top": ranked})
    return Predicted(ref=artifact.ref, path=str(artifact.path or ""), predictions=found)


def _files(path: Path) -> list[Path]:
    """The file itself, or the images below a folder by name."""
    if path.is_dir():
        if not (names := Folder(path).names()):
            raise UsageError(f"{path} holds no images", "give image files, or a folder of them")
        return [path / name for name in sorted(names)]
    if not path.is_file():
        raise NotFound(f"no image {path}", "give image files, or a folder of them")
    return [path]

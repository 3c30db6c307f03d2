"""A teacher's answers, computed once per image and view and kept on disk.

Teacher and student see the same crop (Beyer et al. 2021, arXiv:2106.05237): a view is a pure function of (seed, view,
index), rendered once at the larger of their input sizes, each side then at its own size, mean and std. Student epoch e
reads view e mod V. One safetensors file per view, named by everything that decides its content.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.backbone import sized
from vtzoo.bases import weights_path
from vtzoo.errors import Mismatch, NotFound, Resources, UsageError
from vtzoo.files import sha256
from vtzoo.losses._outputs import Outputs
from vtzoo.spec import Preprocess, plain
from vtzoo.tensors import TensorFile, channels_last, write

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What decides the targets: teachers and their digests, images, the student's preprocessing, crops, seed and precision; `workers` only say how fast."""

    teachers: Sequence[Live]
    digests: Sequence[str]
    images: D.Images
    student: Preprocess
    needs: Sequence[str]
    views: int
    min_scale: float
    seed: int
    precision: str = "fp32"
    workers: int = 0

    def key(self, view: int) -> str:
        """Sixteen hex digits, the file's name."""
        who = [
            [digest, t.card.arch, plain(t.card.model_args), asdict(t.preprocess), t.task.name if t.task else ""]
            for digest, t in zip(self.digests, self.teachers, strict=True)
        ]
        what = [self.images.digest, len(self.images), list(self.images.classes)]
        how = [asdict(self.student), list(self.needs), self.min_scale, self.seed, self.precision, view]
        return hashlib.sha256(json.dumps([who, what, how], sort_keys=True).encode()).hexdigest()[:16]


def ready(
    opened: Sequence[Artifact], task: str | None, images: D.Images, pixels: int | None, *, labelled: bool
) -> tuple[list[Live], D.Images]:
    """The teachers ready to answer, and the images with labels counted as theirs."""
    classes = images.classes if labelled else None
    live = [_looking_at(go_live(a, _task(a, task, classes)), pixels) for a in opened]
    for one, artifact in zip(live, opened, strict=True):
        if labelled and one.task is None:
            raise Mismatch(f"{artifact.ref} has no head, and this loss needs logits", "use --loss feature, or a delta as teacher")  # fmt: skip
        if task is not None and (one.task is None or one.task.name != task):
            raise NotFound(f"{artifact.ref} has no task '{task}'", "leave --task out, or choose another teacher")
        if labelled and one.task and one.task.multilabel:
            raise Mismatch(
                f"task '{one.task.name}' gives several labels to an image, and losses on logits compare one class",
                "use --loss feature",
            )
        if labelled and one.task and sorted(one.task.classes) != sorted(images.classes):
            raise Mismatch(
                f"the data's classes are not those of task '{one.task.name}'",
                "use the task's own images, or --loss feature",
            )
    orders = {one.task.classes for one in live if one.task} if labelled else set[tuple[str, ...]]()
    if len(orders) > 1:
        raise Mismatch("the teachers count the same classes in different orders", "distil from one of them")
    return live, images.aligned(*orders) if orders else images


def _task(artifact: Artifact, asked: str | None, classes: Sequence[str] | None) -> str | None:
    """Whose head a delta answers with; `classes` are the data's, None for a loss that needs no logits."""
    delta = artifact.delta
    if delta is None or (asked is None and len(delta.tasks) < 2):
        return None
    if asked is not None:
        return delta.task(asked).name
    if classes is None:
        return ""
    fitting = [t.name for t in delta.tasks if sorted(t.classes) == sorted(classes)]
    if len(fitting) > 1:
        raise UsageError(
            f"{artifact.ref} has {len(fitting)} tasks with the data's classes: {', '.join(fitting)}",
            f"choose one with --task {fitting[0]}",
        )
    if not fitting:
        known = ", ".join(t.name for t in delta.tasks)
        raise Mismatch(f"the data's classes are those of no task of {artifact.ref} ({known})", "use a task's own images, or --loss feature")  # fmt: skip
    return fitting[0]


def _looking_at(live: Live, pixels: int | None) -> Live:
    card, args = sized(replace(live.card, preprocess=live.preprocess), pixels)
    if args:
        raise UsageError(f"{live.card.name} can look at its own size only", "leave --teacher-size out")
    return replace(live, preprocess=card.preprocess)


def digest_of(artifact: Artifact) -> str:
    """What stands for a teacher: its file's sha256, a bare backbone's fingerprint where that is known."""
    card = artifact.card
    return artifact.digest if card is None else card.fingerprint or sha256(weights_path(card, artifact.zoo))


def outputs(model: nn.Module, x: Tensor, needs: Sequence[str]) -> Outputs:
    """Pooled features and logits of a timm model, as far as needed; [batch, 3, h, w] -> Outputs."""
    if "features" not in needs:
        return Outputs(logits=model(x))
    body = model.forward_features(x)  # type: ignore[operator] - a method of timm models
    features = model.forward_head(body, pre_logits=True)  # type: ignore[operator] - likewise
    logits = model.forward_head(body) if "logits" in needs else None  # type: ignore[operator] - likewise
    return Outputs(logits=logits, features=features)


def prepared(teaching: Teaching, folder: Path) -> list[TensorFile]:
    """The target files of all views; those that are missing are computed.

    Raises:
        Resources: not enough disk for them.
    """
    found: list[TensorFile] = []
    for view in range(teaching.views):
        path = folder / f"{teaching.key(view)}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _enough_disk(teaching, folder)
            write(path, _compute(teaching, view), {"view": str(view)})
        found.append(TensorFile(path))
    return found


def normalised(pixels: Tensor, shape: Preprocess) -> Tensor:
    """uint8 pixels -> a network's input at its own size; [n, 3, s, s] -> [n, 3, h, w]."""
    x = pixels.float() / 255
    if tuple(x.shape[2:]) != shape.input_size[1:]:
        x = F.interpolate(x, shape.input_size[1:], mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = torch.tensor(shape.mean), torch.tensor(shape.std)
    return (x - mean[:, None, None]) / std[:, None, None]


@torch.inference_mode()
def _compute(teaching: Teaching, view: int) -> dict[str, Tensor]:
    side = max([teaching.student.input_size[1], *(t.preprocess.input_size[1] for t in teaching.teachers)])
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(side, (teaching.min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            _Pixels(),
        ]
    )
    columns: dict[str, list[Tensor]] = {"pixels": [], "labels": []}
    ready = D.Seeded(teaching.images, crop, D.mixed(teaching.seed, view))
    every: Any = DataLoader(ready, BATCH, num_workers=teaching.workers)
    reduced = torch.autocast("cpu", torch.bfloat16, enabled=teaching.precision == "bf16")
    models = [channels_last(t.model) for t in teaching.teachers]
    for pixels, labels in talk.track(
        every, f"teacher, view {view + 1}/{teaching.views}", -(-len(teaching.images) // BATCH)
    ):
        small = F.interpolate(
            pixels.float(), teaching.student.input_size[1:], mode="bicubic", antialias=True, align_corners=False
        )
        columns["pixels"].append(small.round().clamp(0, 255).to(torch.uint8))
        columns["labels"].append(labels)
        with reduced:
            answers = [
                outputs(m, normalised(pixels, t.preprocess), teaching.needs)
                for m, t in zip(models, teaching.teachers, strict=True)
            ]
        for name, value in _joined(answers).items():
            columns.setdefault(name, []).append(value.half())
    return {n: torch.cat(parts) for n, parts in columns.items()}


def _joined(answers: Sequence[Outputs]) -> dict[str, Tensor]:
    """Several teachers: features side by side, class probabilities averaged (as log-probabilities)."""
    found: dict[str, Tensor] = {}
    features = [a.features for a in answers if a.features is not None]
    logits = [a.logits for a in answers if a.logits is not None]
    if features:
        found["features"] = torch.cat(features, -1)
    if logits:
        found["logits"] = (
            logits[0] if len(logits) == 1 else torch.stack([z.softmax(-1) for z in logits]).mean(0).log().clamp(min=-60)
        )
    return found


class _Pixels(nn.Module):
    def forward(self, image: Image.Image) -> Tensor:
        return v2.functional.pil_to_tensor(image)


def _enough_disk(teaching: Teaching, folder: Path) -> None:
    import shutil

    pixels = 3 * teaching.student.input_size[1] * teaching.student.input_size[2]
    width = sum(int(getattr(t.model, "num_features", 1280)) for t in teaching.teachers)
    wanted, free = len(teaching.images) * (pixels + 2 * width), shutil.disk_usage(folder).free
    if wanted > free:
        raise Resources(
            f"a view's targets take {wanted >> 20} MiB, {free >> 20} MiB are free in {folder}",
            "use fewer images (--set limit=N) or free some disk",
        )


class Answers:
    """The target files, one view of them at a time in memory."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files, self.view, self.columns = files, -1, dict[str, Tensor]()

    def rows(self, view: int, places: Sequence[int], shape: Preprocess) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, label, features and logits of these images; what the files don't hold is empty, [n, 0]."""
        if view != self.view:
            self.view, self.columns = view, dict(self.files[view])
        index = torch.tensor(places)
        none = torch.empty(len(self.columns["labels"]), 0)
        x = normalised(self.columns["pixels"][index], shape)
        labels, features, logits = (self.columns.get(n, none)[index] for n in ("labels", "features", "logits"))
        return x, labels, features, logits


def statistics(file: TensorFile) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per feature dimension, over one view; [width] each."""
    features = file["features"].float()
    return features.mean(0), features.std(0).clamp(min=1e-3)


def facts(teaching: Teaching) -> dict[str, Any]:
    """What a student's lineage keeps of its teaching."""
    return {
        "teachers": list(teaching.digests),
        "teacher_tasks": [t.task.name if t.task else "" for t in teaching.teachers],
        "data": f"sha256:{teaching.images.digest}",
        "licenses": sorted({t.card.license for t in teaching.teachers if t.card.license}),
        "images": len(teaching.images),
        "views": teaching.views,
    }

"""Whether a file of many tasks gives each image what its task's own network gives it, whatever stands beside it in the batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtzoo.crops import normalised
from vtzoo.errors import ExportMismatch
from vtzoo.onnx.describe import PAD
from vtzoo.onnx.run import Runtime
from vtzoo.onnx.verify import BATCHES, Difference, summary
from vtzoo.spec import Preprocess, Task


@dataclass(frozen=True, slots=True)
class Mixture:
    """A batch: images [n, 3, h, w] and the number of each one's task [n]."""

    images: Tensor
    tasks: Tensor


def mixtures(preprocess: Preprocess, tasks: int) -> list[Mixture]:
    """Pictures of noise, normalised, their tasks in random order: each task alone, 1, 2 and 5 of any, and each task twice, which is the last."""
    draw = torch.Generator().manual_seed(0)
    order = [torch.tensor([t]) for t in range(tasks)]
    order += [torch.arange(n)[torch.randperm(n, generator=draw)] % tasks for n in BATCHES]
    order += [torch.arange(tasks).repeat(2)[torch.randperm(2 * tasks, generator=draw)]]
    shape = preprocess.input_size
    drawn = [torch.randint(256, (len(t), *shape), generator=draw) for t in order]
    return [Mixture(normalised(x, preprocess), t.to(torch.int64)) for x, t in zip(drawn, order, strict=True)]


def of(batches: Iterable[Mixture], task: int) -> Iterator[Tensor]:
    """One task's images [3, h, w] in the order of the batches."""
    return (image for b in batches for image in b.images[b.tasks == task])


@torch.inference_mode()
def alone(network: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> Tensor:
    """What a task's own network gives for its images, one at a time: [images, classes]."""
    return torch.cat([network(image[None]) for image in images])


@torch.inference_mode()
def together(shipped: Runtime, batches: Iterable[Mixture], wanted: Mapping[int, Tensor]) -> dict[int, Difference]:
    """Run the file on the batches: one difference a task that is wanted.

    Raises:
        ExportMismatch: the classes that a task doesn't have are not filled up as the file says.
    """
    size, rows, tasks = (0, 0), list[Tensor](), list[Tensor]()
    for b in batches:
        size = (b.images.shape[2], b.images.shape[3])
        rows.append(torch.from_numpy(shipped.bare(b.images, b.tasks)()))
        tasks.append(b.tasks)
    found: dict[int, Difference] = {}
    for task, own in wanted.items():
        ran, classes = torch.cat(rows)[torch.cat(tasks) == task], own.shape[1]
        if not bool((ran[:, classes:] == PAD).all()):
            raise ExportMismatch(
                f"onnxruntime gives task {task} more than its {classes} classes", "try another --opset"
            )
        found[task] = Difference(size, own.double(), ran[:, :classes].double())
    return found


def judge(found: Mapping[int, Difference], tasks: Sequence[Task], tolerance: float, hint: str) -> None:
    """Refuse a file that computes something else.

    Raises:
        ExportMismatch: says for which task and by how much, and what was allowed.
    """
    for task, difference in found.items():
        if not difference.max_rel <= tolerance:  # NaN isn't
            said = f"in a mixed batch the outputs of '{tasks[task].name}' differ by {difference.max_rel:.1e} of the largest"
            raise ExportMismatch(f"{said} (allowed {tolerance:.1e})", hint)


def rows(
    noise: Mapping[int, Difference],
    real: Mapping[int, Difference],
    tasks: Sequence[Task],
    more: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The report's table, one row a task: its largest differences on noise and on real images; of the latter how many, and how often both say the same."""
    return [
        {
            "number": i,
            "task": t.name,
            **m,
            "classes": len(t.classes),
            **_apart(noise[i], real.get(i), several=t.multilabel),
        }
        for i, (t, m) in enumerate(zip(tasks, more, strict=True))
    ]


def _apart(noise: Difference, real: Difference | None, *, several: bool) -> dict[str, Any]:
    both = [d for d in (noise, real) if d is not None]
    said: dict[str, Any] = {"max_abs": max(d.max_abs for d in both), "max_rel": max(d.max_rel for d in both)}
    if real is None:
        return said
    shown = summary([real], classes=True, several=several)
    kept = ("cosine", "label_agreement" if several else "top1_agreement")
    return {**said, "images": len(real.wanted), **{k: shown[k] for k in kept}}

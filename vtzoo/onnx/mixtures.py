"""Whether a file of many tasks gives each image what its task's own network gives it, whatever stands beside it in the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtzoo.crops import normalised
from vtzoo.errors import ExportMismatch
from vtzoo.onnx.describe import PAD
from vtzoo.onnx.run import Runtime
from vtzoo.onnx.verify import BATCHES, Difference
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


@torch.inference_mode()
def alone(network: Callable[[Tensor], Tensor], batches: Sequence[Mixture], task: int) -> Tensor:
    """What a task's own network gives for its images, one at a time: [images, classes] in the order of the batches."""
    return torch.cat([network(image[None]) for b in batches for image in b.images[b.tasks == task]])


@torch.inference_mode()
def together(shipped: Runtime, batches: Sequence[Mixture], wanted: Sequence[Tensor]) -> list[Difference]:
    """Run the file on the batches: one difference a task.

    Raises:
        ExportMismatch: the classes that a task doesn't have are not filled up as the file says.
    """
    ran = torch.cat([torch.from_numpy(shipped.bare(b.images, b.tasks)()) for b in batches])
    numbers, size = torch.cat([b.tasks for b in batches]), tuple(batches[0].images.shape[2:])
    found: list[Difference] = []
    for task, own in enumerate(wanted):
        rows, classes = ran[numbers == task], own.shape[1]
        if not bool((rows[:, classes:] == PAD).all()):
            raise ExportMismatch(
                f"onnxruntime gives task {task} more than its {classes} classes", "try another --opset"
            )
        found.append(Difference((size[0], size[1]), own.double(), rows[:, :classes].double()))
    return found


def judge(found: Sequence[Difference], tasks: Sequence[Task], tolerance: float, hint: str) -> None:
    """Refuse a file that computes something else.

    Raises:
        ExportMismatch: says for which task and by how much, and what was allowed.
    """
    for difference, task in zip(found, tasks, strict=True):
        if not difference.max_rel <= tolerance:  # NaN isn't
            said = f"in a mixed batch the outputs of '{task.name}' differ by {difference.max_rel:.1e} of the largest"
            raise ExportMismatch(f"{said} (allowed {tolerance:.1e})", hint)


def rows(found: Sequence[Difference], tasks: Sequence[Task], more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The report's table, one row a task."""
    return [
        {"number": i, "task": t.name, **m, "classes": len(t.classes), "max_abs": d.max_abs, "max_rel": d.max_rel}
        for i, (d, t, m) in enumerate(zip(found, tasks, more, strict=True))
    ]

"""What a training will take, from two of its steps: time, memory, disk, and where the delta acts."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.delta import Part
from vtzoo.devices import accelerator, computing
from vtzoo.feed import Batch, Feed
from vtzoo.fit import Plan, stepper
from vtzoo.machine import peak_bytes
from vtzoo.prefix import Prefix
from vtzoo.probing import evaluating


class _Watch:
    """Seconds since it was last asked, with what the device has been given to do."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.last, passed = now, now - self.last
        return passed


def forecast(
    plan: Plan, feed: Feed, prefix: Prefix | None, views: int, val: int, step: Callable[[Batch], object] | None = None
) -> dict[str, Any]:
    """Take two steps; the model is not the same afterwards.

    Args:
        plan: of the training.
        feed: its images as they are, with what runs on them, or on their features.
        prefix: where features are kept, if they are.
        views: of each image, then.
        val: how many images are validated on.
        step: a step of the training, where it isn't the plan's own.

    Returns:
        `steps` of all epochs, `seconds` of the whole training by the second of its steps, `peak_bytes` of the process so
        far, on a GPU of its memory: with the backbone, its optimiser and a batch.
    """
    made = accelerator(plan.recipe)
    device, watch = made.device, _Watch(made.device)
    step = step or stepper(plan)
    for _ in ("cold", "warm"):  # the same whole batch
        watch()
        x, y = (t.to(device) for t in next(iter(feed.batches(0, 0))))
        loading = watch()
        with computing(made):
            inputs = x if prefix is None else prefix.features(plan.model, x)
        before = watch()
        step((inputs, y))
        stepping = watch()
        with computing(made):
            _look(plan.model, feed, inputs)
        looking = watch()
    epochs, batches = plan.recipe.probe_epochs + plan.recipe.epochs, -(-val // plan.recipe.batch_size)
    once, each = (loading + before, 0.0) if prefix else (0.0, loading)
    looks = -(-epochs // plan.recipe.eval_every)
    seconds = once * (views * plan.steps + batches)
    seconds += epochs * plan.steps * (stepping + each) + looks * batches * (looking + each)
    return {"steps": epochs * plan.steps, "seconds": seconds, "peak_bytes": _peak_bytes(device)}


@torch.inference_mode()
def _look(model: nn.Module, feed: Feed, inputs: Tensor) -> None:
    with evaluating(model):
        feed.run(model, inputs)


def _peak_bytes(device: torch.device) -> int:
    """Of the GPU where there is one, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def acting(parts: Sequence[Part]) -> list[str]:
    """Where a stack acts, a line for each method: sites that differ by numbers alone are told together, with their count."""
    lines: list[str] = []
    for part in parts:
        alike: dict[str, list[str]] = {}
        for site in part.sites:
            alike.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", site.name), []).append(
                site.name or "the whole network"
            )
        said = ", ".join(f"{len(own)} {name}" if len(own) > 1 else own[0] for name, own in alike.items())
        lines.append(f"{part.method}: {said or 'the head'}")
    return lines

"""Many linear probes at once: learning rates and weight decays, trained side by side on the same batches of features.

    logits_p = W_p h + b_p,   each probe p with AdamW, gradient clipping and schedule of its own rate

What a probe becomes does not depend on those beside it: the numbers are those of a training of its own in float32, but for
rounding; where features are bf16, probes compute in float32 all the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import knobs, talk
from vtzoo.errors import UsageError, VtzooError
from vtzoo.feed import Feed
from vtzoo.fit import warmed
from vtzoo.recipe import Recipe

BETAS, EPS = (0.9, 0.999), 1e-8
"""AdamW's (Loshchilov & Hutter 2019, arXiv:1711.05101), as in torch."""
OPEN = {
    "optimizer": "adamw", "ema_decay": 0.0, "patience": 0, "probe_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
    "checkpointing": False, "compile": False,
}  # fmt: skip
"""What probes that are trained together can't do otherwise."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One of them: its rate and decay, and what it does on the validation images."""

    lr: float
    weight_decay: float
    top1: float
    val_loss: float


def check(recipe: Recipe) -> None:
    """Refuse what probes can't do together.

    Raises:
        UsageError: an average, patience, mixed images, stochastic depth, another optimiser than AdamW, no validation, or knobs of blocks, of
            which none runs.
    """
    asked = asdict(recipe)
    if wrong := [f"{k}={asked[k]}" for k, v in OPEN.items() if asked[k] != v]:
        raise UsageError(
            f"probes that are trained together have no {', '.join(wrong)}",
            "leave it out, or train one: --method linear",
        )
    if not recipe.validates:
        raise UsageError(
            "the best probe is chosen on validation images, and none are measured", "train_on=train, eval_on=val"
        )


def asked_for(parts: Sequence[tuple[knobs.Part, Any]], recipe: Recipe, user: Mapping[str, Any], *, resume: bool) -> Any:
    """The linear probe's knobs, where it has any: then many are trained side by side; a preset's rate and decay give way to them.

    Raises:
        UsageError: it stands in a stack, has a checkpoint to go on from, or wants what such probes don't have.
    """
    found = [knobs.decode(m.Config, p.knobs, p.name) for p, m in parts if p.name == "linear" and p.knobs]
    if not found:
        return None
    if len(parts) > 1:
        raise UsageError("linear[lr=…] trains nothing but heads", "leave the other methods out, or give --lr")
    for knob, flag in (("lr", "lr"), ("lr", "head_lr"), ("weight_decay", "weight_decay")):
        if getattr(found[0], knob) and user.get(flag) is not None:
            raise UsageError(f"linear[{knob}=…] and {flag} say the same twice", f"leave {flag} out")
    if resume:
        raise UsageError("probes that are trained together have no checkpoint", "start without --resume")
    check(recipe)
    return found[0]


@torch.no_grad()
def sweep(
    head: nn.Linear, feed: Feed, recipe: Recipe, grid: Sequence[tuple[float, float]], weights: Tensor | None = None
) -> list[Probe]:
    """Train a probe for each pair of learning rate and weight decay; the head becomes the best one.

    Args:
        head: what all of them start from, [classes, features].
        feed: of features.
        recipe: epochs, warm-up, label smoothing, clipping.
        grid: (lr, weight_decay) of each.
        weights: how much the images of each class count, [classes], where that differs.

    Returns:
        One record each.
    """
    probes = _Probes(head, recipe, grid, weights)
    rates = _rates(recipe, feed.steps)
    for epoch in range(recipe.epochs):
        batches = talk.track(feed.batches(epoch, 0), f"epoch {epoch + 1}/{recipe.epochs}", feed.steps)
        for step, (x, y) in enumerate(batches, start=epoch * feed.steps):
            probes.step(x.to(head.weight), y.to(head.weight.device), rates[step])
    found = probes.measured([(x.to(head.weight), y.to(head.weight.device)) for x, y in feed.held_out()])
    best = found.index(best_of(found))
    head.weight.copy_(probes.values[0][best])
    if head.bias is not None:
        head.bias.copy_(probes.values[1][best])
    return found


def stepper(
    head: nn.Linear, recipe: Recipe, grid: Sequence[tuple[float, float]], weights: Tensor | None = None
) -> Callable[[tuple[Tensor, Tensor]], None]:
    """Updates of all probes one at a time, for who measures them: each call takes a batch of features."""
    probes = _Probes(head, recipe, grid, weights)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            probes.step(batch[0].to(head.weight), batch[1].to(head.weight.device), 1.0)

    return step


def best_of(probes: Sequence[Probe]) -> Probe:
    """The highest top-1, of several the lowest loss, of several the first.

    Raises:
        VtzooError: none has a finite loss.
    """
    finite = [p for p in probes if math.isfinite(p.val_loss)]
    if not finite:
        raise VtzooError(f"the loss of all {len(probes)} probes is no longer finite", "try lower learning rates")
    return max(finite, key=lambda p: (p.top1, -p.val_loss))


class _Probes:
    """Weights [probes, classes, features] and biases [probes, classes] with AdamW's moments."""

    def __init__(
        self, head: nn.Linear, recipe: Recipe, grid: Sequence[tuple[float, float]], weights: Tensor | None
    ) -> None:
        own = [head.weight] if head.bias is None else [head.weight, head.bias]
        self.values = [p.detach().repeat(len(grid), *[1] * p.ndim) for p in own]
        self.moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in self.values]
        self.grid, self.smoothing, self.clip, self.count = grid, recipe.label_smoothing, recipe.clip_norm, 0
        self.lr, self.decay = head.weight.new_tensor(grid).T
        self.weights = None if weights is None else weights.to(head.weight)

    def logits(self, x: Tensor) -> Tensor:
        """[images, probes, classes] for features [images, features]."""
        weight = self.values[0]
        y = (x @ weight.flatten(0, 1).T).view(len(x), *weight.shape[:2])
        return y + self.values[1] if len(self.values) > 1 else y

    def step(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One update of all; `rate` is the schedule's share of each one's learning rate."""
        logits = self.logits(x)
        classes = logits.shape[-1]
        wanted = F.one_hot(y, classes).to(x.dtype) * (1 - self.smoothing) + self.smoothing / classes
        error = (logits.softmax(-1) - wanted[:, None]) / len(x)
        if self.weights is not None:
            error *= self.weights[y][:, None, None]
        grads = [(error.flatten(1).T @ x).view_as(self.values[0]), error.sum(0)][: len(self.values)]
        if self.clip:
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            for g in grads:
                g.mul_(_over(factor, g))
        self.count += 1
        lr = self.lr * rate
        self.values[0].mul_(_over(1 - lr * self.decay, self.values[0]))  # a bias does not decay
        for value, grad, (first, second) in zip(self.values, grads, self.moments, strict=True):
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            size = (second.sqrt() / (1 - BETAS[1] ** self.count) ** 0.5).add_(EPS)
            value.sub_(first / size * _over(lr / (1 - BETAS[0] ** self.count), value))

    def measured(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Probe]:
        """Top-1 and loss of each."""
        right, loss, count = torch.zeros_like(self.lr), torch.zeros_like(self.lr), 0
        for x, y in batches:
            logits = self.logits(x)
            right += (logits.argmax(-1) == y[:, None]).sum(0)
            each = F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(len(self.grid)), reduction="none")
            loss += each.view(len(x), -1).sum(0)
            count += len(x)
        pairs = zip(self.grid, (right / count).tolist(), (loss / count).tolist(), strict=True)
        return [Probe(lr=lr, weight_decay=decay, top1=top1, val_loss=own) for (lr, decay), top1, own in pairs]


def _over(values: Tensor, like: Tensor) -> Tensor:
    """One value per probe, to multiply what probes have."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _rates(recipe: Recipe, steps: int) -> list[float]:
    """The schedule's share of the learning rate, step by step."""
    one = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    total = recipe.epochs * steps
    schedule: Any = CosineLRScheduler(one, **warmed(recipe, 1.0, total, steps))
    shares: list[float] = []
    for step in range(total):
        schedule.step_update(step)
        shares.append(one.param_groups[0]["lr"])
    return shares

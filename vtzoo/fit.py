"""The one training loop: deltas, heads and students, on any device that accelerate knows, exactly resumable.

Every random draw of a step is a function of (seed, step) and every image's of (seed, epoch, index), so a run that was
stopped and taken up again gives the same bits on the same machine as one that ran through.
"""

import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from vtzoo import files, talk
from vtzoo.errors import Interrupted, Mismatch, NotFound, VtzooError
from vtzoo.recipe import Recipe
from vtzoo.tensors import TensorFile, write

Batch = tuple[Tensor, ...]
DEFAULT_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, and on what.

    Attributes:
        model: its parameters with `requires_grad` are trained.
        loss: (model, batch) -> scalar.
        batches: (epoch, first step) -> batches.
        steps: per epoch.
        recipe: lr and weight_decay resolved.
        validate: measures the model after each epoch, in the recipe's precision: {"top1": …} or {"loss": …}; never on test data.
        extra: a further trained module that is not kept (a projector).
        head: names of the model's parameters that learn at `head_lr`.
        checkpoint: where to write after each epoch and when interrupted.
        key: identifies the run; a checkpoint of another key is refused.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[int, int], Iterable[Batch]]
    steps: int
    recipe: Recipe
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None
    extra: nn.Module | None = None
    head: frozenset[str] = frozenset()
    checkpoint: Path | None = None
    key: str = ""


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, ...] | None = None
    since_best: int = 0


def fit(plan: Plan, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train; afterwards the model holds the last epoch's weights, or the best validated ones when `patience` is on.

    Args:
        plan: see `Plan`.
        resume: go on from the checkpoint.

    Returns:
        One record per epoch: epoch, loss, lr, and what `validate` measured.

    Raises:
        NotFound: nothing to resume.
        Mismatch: the checkpoint is of another run.
        Interrupted: stopped by the user; the checkpoint is written.
        VtzooError: the loss is no longer finite.
    """
    run = _Run(plan)
    if resume:
        run.load()
    epochs = plan.recipe.epochs
    with _stoppable() as stopped:
        for epoch in range(run.state.step // plan.steps, epochs):
            run.epoch(epoch, stopped)
            if run.exhausted():
                break
            if epoch + 1 < epochs:
                run.save()
    run.finish()
    return run.state.history


class _Run:
    """A plan with its optimiser, schedule and state."""

    def __init__(self, plan: Plan) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # a process may train several times, each in its own precision; accelerate has no public way to say so
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - see above
        recipe = plan.recipe
        precision = {"fp32": "no"}.get(recipe.precision, recipe.precision)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=recipe.device == "cpu")
        self.plan, self.state = plan, State()
        self.device = self.accelerator.device
        self.model = plan.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload] - torch takes both
        everything = nn.ModuleDict(
            {"model": self.model} | ({"extra": plan.extra.to(self.device)} if plan.extra else {})
        )
        self.trained = {n: p for n, p in everything.named_parameters() if p.requires_grad}
        self.optimizer = create_optimizer_v2(self._groups(), opt=recipe.optimizer, lr=recipe.lr or DEFAULT_LR)
        total = max(2, recipe.epochs * plan.steps)
        warmup = min(total // 2, math.ceil(recipe.warmup_epochs * plan.steps)) if recipe.epochs * plan.steps > 1 else 0
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=total, lr_min=(recipe.lr or DEFAULT_LR) * recipe.min_lr_fraction, warmup_t=warmup,
            warmup_lr_init=(recipe.lr or DEFAULT_LR) * 0.01, warmup_prefix=False, t_in_epochs=False,
        )  # fmt: skip
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.parallel = self.accelerator.prepare(self.model) if self.accelerator.num_processes > 1 else self.model
        self.best: dict[str, Tensor] = {}

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate and weight decay; biases and other vectors do not decay."""
        recipe, head = self.plan.recipe, {f"model.{n}" for n in self.plan.head}
        lr, decay = recipe.lr or DEFAULT_LR, recipe.weight_decay or 0.0
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            key = (recipe.head_lr or lr) if name in head else lr, decay if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
        return [{"params": v, "lr": k[0], "weight_decay": k[1]} for k, v in groups.items()]

    def epoch(self, epoch: int, stopped: Callable[[], bool]) -> None:
        """One pass, from wherever in it the state stands; then validation."""
        plan, state = self.plan, self.state
        self.model.train()
        start, losses = state.step - epoch * plan.steps, list[Tensor]()
        steps = plan.batches(epoch, start)
        for batch in talk.track(steps, f"epoch {epoch + 1}/{plan.recipe.epochs}", plan.steps - start):
            losses.append(self.step(tuple(t.to(self.device) for t in batch)))
            if stopped():
                self.save()
                where = f", checkpoint at step {state.step}" if plan.checkpoint else ""
                raise Interrupted(
                    f"interrupted in epoch {epoch + 1}{where}", "go on with the same command and --resume"
                )
        mean = torch.stack(losses).mean().item() if losses else float("nan")
        if losses and not math.isfinite(mean):
            raise VtzooError(f"the loss is {mean} in epoch {epoch + 1}", "try a lower --lr, or --precision fp32")
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": mean, "lr": self.optimizer.param_groups[0]["lr"]}
        if plan.validate is not None:
            with self.accelerator.autocast():
                record |= plan.validate(self.ema.module if self.ema else self.model)
            self._note(record)
        state.history.append(record)
        talk.say("  ".join(f"{k} {v:.4g}" for k, v in record.items()))

    def step(self, batch: Batch) -> Tensor:
        """One update; its random numbers depend on the seed and the step alone."""
        recipe, state = self.plan.recipe, self.state
        torch.manual_seed((recipe.seed << 24) + state.step + 1)
        np.random.seed((recipe.seed * 1_000_003 + state.step) % 2**32)  # noqa: NPY002 - timm's Mixup draws from the global generator
        self.schedule.step_update(state.step)
        with self.accelerator.autocast():
            loss = self.plan.loss(self.parallel, batch)
        self.accelerator.backward(loss)
        if recipe.clip_norm:
            self.accelerator.clip_grad_norm_(list(self.trained.values()), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if self.ema:
            self.ema.update(self.model, step=state.step)
        return loss.detach().float()

    def exhausted(self) -> bool:
        """Whether validation has not improved for `patience` epochs."""
        patience = self.plan.recipe.patience
        return bool(patience) and self.state.since_best >= patience

    def finish(self) -> None:
        """Put the chosen weights in the model and remove the checkpoint."""
        if self.plan.recipe.patience and self.best:
            with torch.no_grad():
                for name, value in self.best.items():
                    self.trained[name].copy_(value)
        elif self.ema:
            source = dict(self.ema.module.named_parameters())
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(source[name])
        self.model.eval()
        if self.plan.checkpoint is not None:
            self.plan.checkpoint.unlink(missing_ok=True)

    def _note(self, record: Mapping[str, float]) -> None:
        score = (record.get("top1", 0.0), -record.get("val_loss", record.get("loss", 0.0)))
        if self.state.best is None or score > self.state.best:
            self.state.best, self.state.since_best = score, 0
            if self.plan.recipe.patience:
                source = dict(self.ema.module.named_parameters(prefix="model")) if self.ema else self.trained
                self.best = {n: source.get(n, p).detach().clone() for n, p in self.trained.items()}
        else:
            self.state.since_best += 1

    def save(self) -> None:
        """Write the checkpoint: trained parameters, optimiser, EMA and the best weights, in safetensors."""
        if self.plan.checkpoint is None:
            return
        tensors = {f"trained/{n}": p.detach() for n, p in self.trained.items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in slots.items()}
        if self.ema:
            tensors |= {f"ema/{n}": t for n, t in self.ema.module.state_dict().items() if "model." + n in self.trained}
        state = {
            "step": self.state.step,
            "history": self.state.history,
            "best": self.state.best,
            "since_best": self.state.since_best,
        }
        self.plan.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write(self.plan.checkpoint, tensors, {"key": self.plan.key, "state": json.dumps(state)})

    def load(self) -> None:
        """Take up the checkpoint."""
        path = self.plan.checkpoint
        if path is None or not path.is_file():
            raise NotFound("there is no checkpoint to resume", "start without --resume")
        stored, meta = TensorFile(path), files.header(path).metadata
        if meta["key"] != self.plan.key:
            raise Mismatch(
                "the checkpoint belongs to another recipe, method or data",
                "repeat the first command with --resume, or start without it",
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(stored[f"trained/{name}"])
            if self.ema:
                own = self.ema.module.state_dict()
                for name in (n for n in stored if n.startswith("ema/")):
                    own[name.removeprefix("ema/")].copy_(stored[name])
        self.best = {n.removeprefix("best/"): stored[n] for n in stored if n.startswith("best/")}
        slots: dict[int, dict[str, Tensor]] = {}
        for name in (n for n in stored if n.startswith("optimizer/")):
            _, index, key = name.split("/")
            slots.setdefault(int(index), {})[key] = stored[name]
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        state = json.loads(meta["state"])
        self.state = State(
            state["step"], state["history"], tuple(state["best"]) if state["best"] else None, state["since_best"]
        )


@contextmanager
def _stoppable() -> Generator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request that is honoured after the step; the second one stops at once."""
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

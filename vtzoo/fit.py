"""The one training loop: deltas, heads and students, on any device that accelerate knows, in one process or many, exactly resumable.

Every random draw of a step is a function of (seed, step) and every image's of (seed, epoch, index), so a run that was
stopped and taken up again gives the same bits on the same machine as one that ran through. The checkpoint stays until
who asked for the training has kept its result and deletes it: `--resume` then repeats no step.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from vtzoo import blocks, files, parallel, talk
from vtzoo.data import mixed
from vtzoo.devices import accelerator, channels_last, computing
from vtzoo.errors import Interrupted, Mismatch, NotFound, UsageError, VtzooError
from vtzoo.graft import has_statistics
from vtzoo.narrow import narrow
from vtzoo.recipe import Recipe
from vtzoo.stopping import stoppable
from vtzoo.tensors import TensorFile, write

Batch = tuple[Tensor, ...]
DEFAULT_LR = 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, and on what.

    Attributes:
        model: its parameters with `requires_grad` are trained.
        loss: (model, batch) -> scalar, the mean over the batch's images.
        batches: (epoch, first step) -> batches; in several processes each process's own part of them (see `parallel.own`).
        steps: per epoch.
        recipe: lr and weight_decay resolved.
        validate: measures the model after each epoch, in the recipe's precision: {"top1": …}, {"map": …} or {"loss": …}; never on test data.
        extra: a further trained module that is not kept (a projector).
        head: names of the model's parameters that learn at `head_lr`.
        rates: factors of the peak learning rate by name.
        shares: factors of the whole schedule by name, its lowest rate included; not of the head's.
        undecayed: names of matrices without weight decay.
        checkpoint: where to write after each epoch and when interrupted.
        key: identifies the run; a checkpoint of another key is refused.
        notes: what else the checkpoint's header is to say.
        watch: is told each epoch's record; of several processes, the first one's.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[int, int], Iterable[Batch]]
    steps: int
    recipe: Recipe
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None
    extra: nn.Module | None = None
    head: frozenset[str] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    undecayed: frozenset[str] = frozenset()
    checkpoint: Path | None = None
    key: str = ""
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    watch: Callable[[Mapping[str, Any]], None] | None = None


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, ...] | None = None
    since_best: int = 0


def checkpoint_path(zoo_root: Path, name: str, kind: str) -> Path:
    """Where the run that makes `name` keeps its checkpoint; no two names or kinds ("delta", "student") share one."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return zoo_root / ".vtzoo" / "checkpoints" / f"{name.replace('/', '--')[:80]}.{digest}.{kind}.safetensors"


def forget(checkpoint: Path) -> None:
    """Take a checkpoint away whose result is kept; one that can't be is left to `vtzoo gc --runs`."""
    with suppress(OSError):
        checkpoint.unlink(missing_ok=True)


def warmed(recipe: Recipe, lr: float, steps: int, of_epoch: int) -> dict[str, Any]:
    """What timm's cosine schedule is given: warm-up from a hundredth, then down, over `steps`, of which an epoch has `of_epoch`."""
    return {
        "t_initial": max(2, steps), "lr_min": lr * recipe.min_lr_fraction, "warmup_lr_init": lr * 0.01,
        "warmup_t": min(steps // 2, math.ceil(recipe.warmup_epochs * of_epoch)), "warmup_prefix": False, "t_in_epochs": False,
    }  # fmt: skip


def fit(plan: Plan, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train; afterwards the model holds the last epoch's weights, or the best validated ones when `patience` is on.

    The last checkpoint stays: delete `plan.checkpoint` when the result is stored.

    Args:
        plan: see `Plan`.
        resume: go on from the checkpoint; where it is a finished run's, no step is taken.

    Returns:
        One record per epoch: epoch, loss, lr, and what `validate` measured.

    Raises:
        UsageError: an epoch without a batch, a probe without a head, a device or precision that isn't here, norms that
            would gather statistics in several processes, or no blocks to compute again or to compile.
        NotFound: nothing to resume.
        Mismatch: the checkpoint is of another run, or the processes are.
        Interrupted: stopped by the user; the checkpoint is written.
        VtzooError: the loss is no longer finite, or torch.compile fails.
    """
    if plan.steps < 1:
        raise UsageError("there is no batch to train on", "use more images (see limit), or a smaller --batch-size")
    if plan.recipe.probe_epochs and not plan.head:
        raise UsageError("there is no head to train alone first", "leave probe_epochs at 0")
    run = _Run(plan)
    with run.narrowed, stoppable() as stopped:
        run.meet()
        if resume:
            run.load()
        while len(run.state.history) < plan.recipe.probe_epochs + plan.recipe.epochs and not run.exhausted():
            run.epoch(len(run.state.history), stopped)
            run.save()
            if plan.watch is not None and parallel.rank() == 0:
                plan.watch(run.state.history[-1])
            if stopped():
                raise run.interrupted(f"after epoch {len(run.state.history)}")
        run.finish()
    return run.state.history


def stepper(plan: Plan) -> Callable[[Batch], Tensor]:
    """A plan's updates one at a time, for who measures them: each call takes a batch and returns its loss."""
    run = _Run(plan)
    run.model.train()
    return run.step


class _Run:
    """A plan with its optimiser, schedule and state."""

    def __init__(self, plan: Plan) -> None:
        recipe = plan.recipe
        self.accelerator = accelerator(recipe)
        self.plan, self.state = plan, State()
        self.device = self.accelerator.device
        precision = partial(computing, self.accelerator)
        compiler = "inductor" if recipe.compile else ""
        self.blocks = blocks.manner(plan.model, precision, again=recipe.checkpointing, compiled=compiler)
        share = recipe.parallel == "fsdp"
        self.model = parallel.sharded(plan.model, self.device) if share else channels_last(plan.model.to(self.device))
        self.everything = nn.ModuleDict(
            {"model": self.model} | ({"extra": plan.extra.to(self.device)} if plan.extra else {})
        )
        self.trained = {n: p for n, p in self.everything.named_parameters() if p.requires_grad}
        plain = create_optimizer_v2(self._groups(), opt=recipe.optimizer, lr=recipe.lr or DEFAULT_LR)
        # prepared, so that with fp16 gradients are unscaled before they are clipped and overflowing steps are skipped
        self.optimizer: Any = self.accelerator.prepare_optimizer(plain)
        self.probing = recipe.probe_epochs * plan.steps  # steps in which the head learns alone
        self.schedules = [self._schedule(n * plan.steps) for n in (recipe.probe_epochs, recipe.epochs)]
        self.narrowed = ExitStack()
        if recipe.precision != "fp32" and not share:
            self.narrowed.callback(narrow(self.model, DTYPES[recipe.precision], precision))
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.best: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # of this epoch's steps

    def meet(self) -> None:
        """See that all processes train the same, and start from the first one's numbers.

        Raises:
            UsageError: norms would gather statistics, each process's of its own images.
            Mismatch: they were started differently.
        """
        if parallel.count() == 1:
            return
        if any(m.training and has_statistics(m) for m in self.everything.train().modules()):
            raise UsageError("norms that gather statistics want whole batches", "train it in one process")
        parallel.agree(json.dumps([self.plan.key, self.plan.steps, sorted(self.trained)]))
        parallel.spread(self._changing().values())

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate and weight decay; biases, other vectors and factors do not decay."""
        recipe, head = self.plan.recipe, {f"model.{n}" for n in self.plan.head}
        lr, decay = recipe.lr or DEFAULT_LR, recipe.weight_decay or 0.0
        groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            own = name.removeprefix("model.")
            rate = (recipe.head_lr or lr) if name in head else lr * self.plan.rates.get(own, 1.0)
            share = 1.0 if name in head else self.plan.shares.get(own, 1.0)
            decays = parameter.ndim > 1 and own not in self.plan.undecayed
            groups.setdefault((rate, decay if decays else 0.0, share), []).append(parameter)
        return [{"params": v, "lr": k[0], "weight_decay": k[1], "lr_scale": k[2]} for k, v in groups.items()]

    def _schedule(self, steps: int) -> CosineLRScheduler:
        """Warm-up and cosine over so many steps."""
        lr = self.plan.recipe.lr or DEFAULT_LR
        return CosineLRScheduler(self.optimizer, **warmed(self.plan.recipe, lr, steps, self.plan.steps))

    def _set_rate(self, step: int) -> None:
        """The learning rates of a step."""
        past = step >= self.probing
        self.schedules[past].step_update(step - self.probing * past)

    def epoch(self, epoch: int, stopped: Callable[[], bool]) -> None:
        """One pass, from wherever in it the state stands; then validation."""
        plan, state = self.plan, self.state
        self.model.train()
        head = {f"model.{n}" for n in plan.head}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(epoch >= plan.recipe.probe_epochs or name in head)
        if epoch == plan.recipe.probe_epochs:  # patience counts from where everything learns
            state.since_best = 0
        start = state.step - epoch * plan.steps  # all of them, where only the validation is still to be done
        steps = plan.batches(epoch, start)
        count = plan.recipe.probe_epochs + plan.recipe.epochs
        for batch in talk.track(steps, f"epoch {epoch + 1}/{count}", plan.steps - start):
            self.losses.append(self.step(tuple(t.to(self.device) for t in batch)))
            if stopped():
                self.save()
                raise self.interrupted(f"in epoch {epoch + 1}")
        mean = torch.stack(self.losses).mean().item()
        if not math.isfinite(mean):
            raise VtzooError(f"the loss is {mean} in epoch {epoch + 1}", "try a lower --lr, or --precision fp32")
        first = self.optimizer.param_groups[0]
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": mean, "lr": first["lr"] / first["lr_scale"]}
        if plan.validate is not None and ((epoch + 1) % plan.recipe.eval_every == 0 or epoch + 1 == count):
            with computing(self.accelerator):
                scores = plan.validate(self.ema.module if self.ema else self.model)
            record |= parallel.by_first(lambda: scores)
            self._note(record)
        state.history.append(record)
        self.losses = []
        talk.say("  ".join(f"{k} {v:.4g}" for k, v in record.items()))

    def step(self, batch: Batch) -> Tensor:
        """One update; its random numbers depend on the seed and the step alone, and dropout's on the process."""
        recipe, state = self.plan.recipe, self.state
        seed, rank = (recipe.seed << 24) + state.step + 1, parallel.rank()
        self._reseed(mixed(seed, rank) if rank else seed)
        np.random.seed((recipe.seed * 1_000_003 + state.step) % 2**32)  # noqa: NPY002 - timm's Mixup draws from the global generator
        self._set_rate(state.step)
        with self.blocks():
            with computing(self.accelerator):
                loss = self.plan.loss(self.model, batch)
            self.accelerator.backward(loss)
        mean = parallel.average(self.trained.values(), loss.detach().float(), len(batch[0]))
        if recipe.clip_norm:
            self.accelerator.clip_grad_norm_(list(self.trained.values()), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if self.ema:
            self.ema.update(self.model, step=state.step)
        return mean

    def _reseed(self, seed: int) -> None:
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(
                seed
            )  # torch.manual_seed would note a stack trace for other devices, too
        else:
            torch.manual_seed(seed)

    def interrupted(self, when: str) -> Interrupted:
        """What to raise once the checkpoint is written."""
        where = f", checkpoint at step {self.state.step}" if self.plan.checkpoint else ""
        return Interrupted(f"interrupted {when}{where}", "go on with the same command and --resume")

    def exhausted(self) -> bool:
        """Whether validation has not improved for `patience` epochs."""
        patience = self.plan.recipe.patience
        return bool(patience) and self.state.since_best >= patience and self.state.step > self.probing

    def finish(self) -> None:
        """Put the chosen weights in the model."""
        chosen = self.best if self.plan.recipe.patience else {}
        _copy(chosen or (self._averaged() if self.ema else {}), self._changing())
        self.model.eval()

    def _changing(self) -> dict[str, Tensor]:
        """What training changes: the trained parameters, and running statistics of norms."""
        state = self.everything.state_dict()
        return {n: t for n, t in state.items() if n in self.trained or n.rpartition(".")[2] in STATISTICS}

    def _averaged(self) -> dict[str, Tensor]:
        """The same of the model that is validated: the moving average, if there is one."""
        own = self._changing()
        if self.ema:
            own |= {n: t for n, t in self.ema.module.state_dict(prefix="model.").items() if n in own}
        return own

    def _note(self, record: Mapping[str, float]) -> None:
        score = (record.get("top1", record.get("map", 0.0)), -record.get("val_loss", record.get("loss", 0.0)))
        if self.state.best is None or score > self.state.best:
            self.state.best, self.state.since_best = score, 0
            if self.plan.recipe.patience:
                self.best = {n: t.clone() for n, t in self._averaged().items()}
        else:
            self.state.since_best += 1

    def save(self) -> None:
        """Write the checkpoint: weights, optimiser, EMA, the best weights and this epoch's losses, in safetensors."""
        if (path := self.plan.checkpoint) is None:
            return
        tensors = {f"trained/{n}": t for n, t in self._changing().items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in slots.items()}
        if self.ema:
            tensors |= {f"ema/{n}": t for n, t in self._averaged().items()}
        if self.losses:
            tensors["losses"] = torch.stack(self.losses)
        state = {
            "step": self.state.step,
            "history": self.state.history,
            "best": self.state.best,
            "since_best": self.state.since_best,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        notes = {**self.plan.notes, "key": self.plan.key, "state": json.dumps(state)}
        path.parent.mkdir(parents=True, exist_ok=True)
        parallel.by_first(lambda: write(path, tensors, notes))

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
        _copy(_below(stored, "trained/"), self._changing())
        _copy(_below(stored, "ema/"), self._averaged())
        self.best = _below(stored, "best/")
        self.losses = list(stored["losses"].to(self.device)) if "losses" in stored else []
        slots: dict[int, dict[str, Tensor]] = {}
        for name in (n for n in stored if n.startswith("optimizer/")):
            _, index, key = name.split("/")
            slots.setdefault(int(index), {})[key] = stored[name]
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        state = json.loads(meta["state"])
        self.state = State(
            state["step"], state["history"], tuple(state["best"]) if state["best"] else None, state["since_best"]
        )
        self._set_rate(max(0, self.state.step - 1))
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _below(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): stored[n] for n in stored if n.startswith(prefix)}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)

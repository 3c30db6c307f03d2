"""What test_parallel.py does in one process and in two: train, and write down every step's loss.

torchrun --nproc-per-node 2 tests/e2e/curves.py ZOO DATA OUT CASES
"""

import io
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vtzoo import parallel
from vtzoo.errors import Interrupted, UsageError
from vtzoo.fit import Batch, Plan, _Run, fit
from vtzoo.recipe import Recipe
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main as cli

RECIPE: dict[str, Any] = {"epochs": 5, "batch_size": 20, "lr": 1e-2, "warmup_epochs": 0.5}
IMAGES = 83
"""25 steps; an epoch's last batch is a single image."""


def curve(
    zoo: Zoo, data: str, name: str, case: Mapping[str, Any], *, stop_at: int = 0, resume: bool = False, **recipe: Any
) -> dict[str, Any]:
    """Train a case; each step's loss and the images that came here. The last process gets Ctrl-C in step `stop_at`."""
    seen: dict[str, Any] = {"losses": [], "images": [], "stopped": False}
    knobs = {**RECIPE, **case.get("recipe", {}), **recipe}
    with watched(seen, stop_at):
        try:
            made = train(
                backbone=case["backbone"], method=case["method"], data=data, name=f"task/{name}", zoo=zoo, recipe=knobs,
                resume=resume,
            )  # fmt: skip
        except Interrupted:
            return {**seen, "stopped": True}
    return {**seen, "digest": made.digest, "val": made.metrics["val"]}


@contextmanager
def watched(seen: dict[str, Any], stop_at: int) -> Iterator[None]:
    """Note every step, and after the first one how the parameters lie in memory."""
    step = _Run.step

    def noted(run: _Run, batch: Batch) -> Tensor:
        loss = step(run, batch)
        seen["losses"].append(loss.item())
        seen["images"].append(len(batch[0]))
        seen.setdefault("kept", kept(run.model))
        if len(seen["losses"]) == stop_at and parallel.rank() == parallel.count() - 1:
            signal.raise_signal(signal.SIGINT)
        return loss

    _Run.step = noted
    try:
        yield
    finally:
        _Run.step = step


def kept(model: nn.Module) -> dict[str, Any]:
    """Of the frozen parameters: how many are DTensors, and which share of their values lies in this process."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    here = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return {
        "frozen": len(frozen),
        "shards": sum(isinstance(p, DTensor) for p in frozen),
        "share": sum(p.numel() for p in here) / sum(p.numel() for p in frozen),
    }


def typed(words: Sequence[str]) -> dict[str, Any]:
    """What a command line gives, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli(words)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def statistics() -> str:
    """What is said of a norm that would gather statistics."""
    knobs = Recipe(epochs=1)
    plan = Plan(model=nn.BatchNorm1d(3), loss=lambda m, b: m(b[0]).sum(), batches=lambda *_: [], steps=1, recipe=knobs)
    try:
        fit(plan)
    except UsageError as refusal:
        return str(refusal)
    return ""


def main(zoo: Path, data: Path, out: Path, cases: Path) -> None:
    """Train all cases, run the command lines among them, and leave what this process saw in OUT.RANK."""
    found: dict[str, Any] = {}
    for name, case in json.loads(cases.read_text(encoding="utf-8")).items():
        if "words" in case:
            found[name] = typed([*case["words"], "--zoo", str(zoo), "--data", str(data)])
        else:
            found[name] = curve(Zoo(zoo), str(data), f"two-{name}", case, stop_at=case.get("stop_at", 0))
    found["statistics"] = statistics()
    out.with_suffix(f".{parallel.rank()}").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))

"""Write a delta as a folder that PEFT loads, and prove that reading it back gives the same function."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtzoo import talk
from vtzoo.anatomy import survey
from vtzoo.artifact import as_delta, open_ref
from vtzoo.backbone import build_card
from vtzoo.delta import Delta
from vtzoo.errors import ExportMismatch
from vtzoo.files import atomic_dir, sha256
from vtzoo.interop import peft
from vtzoo.interop._parts import Origin, assemble
from vtzoo.live import attach
from vtzoo.results import Exported
from vtzoo.spec import Task
from vtzoo.zoo import Zoo

PROBES, TOLERANCE = 2, 1e-6


def export_peft(*, ref: str, out: Path, task: str | None = None, zoo: Zoo | None = None) -> Exported:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `vtzoo.json`; the folder appears once it was checked.

    Args:
        ref: a delta of one part that PEFT has a form for.
        out: the folder to make.
        task: whose head, where there are several.
        zoo: where to look.

    Raises:
        Mismatch: PEFT can't hold it, or would make another function of it, and why.
        ExportMismatch: what was written is not the delta's function.
        Conflict: the folder exists.
    """
    zoo = zoo or Zoo.find()
    artifact = open_ref(ref, zoo)
    delta = as_delta(artifact)
    chosen = delta.task(task) if delta.tasks else None
    bare = build_card(delta.backbone, zoo=zoo)
    head = dict(delta.head(chosen.name)) if chosen else {}
    config, tensors = peft.pack(delta, survey(bare), head)
    with atomic_dir(Path(out)) as folder:
        peft.save(folder, config, tensors, _beside(delta, chosen, artifact.digest))
        worst = _verify(folder, delta, chosen, zoo)
        digest = sha256(folder / peft.WEIGHTS)
    if config.get("boft_n_butterfly_factor", 1) > 1:
        talk.say(
            "PEFT loads a BOFT of more than one factor only where its CUDA kernel is; boft[factors=1] loads anywhere"
        )
    report = {
        "peft_type": config["peft_type"],
        "modules": len(delta.parts[0].sites),
        "tensors": len(tensors),
        "max_rel": worst,
    }
    checked = f"{PROBES} random images, read back, in float64"
    return Exported(ref=artifact.ref, path=str(out), report={**report, "verified_on": checked, "sha256": digest})


def _beside(delta: Delta, task: Task | None, digest: str) -> dict[str, Any]:
    """The delta's own header, with the one task; PEFT has no place for it."""
    header = delta.with_(tasks=(task,) if task else ()).header()
    return {**header, "parent": f"sha256:{digest}"}


@torch.inference_mode()
def _verify(folder: Path, delta: Delta, task: Task | None, zoo: Zoo) -> float:
    """Read the folder as `import peft` does and compare outputs."""
    classes = len(task.classes) if task else 0
    x = torch.randn(
        PROBES,
        *(task.preprocess if task else delta.backbone.preprocess).input_size,
        generator=torch.Generator().manual_seed(0),
    )
    mine, bare = (build_card(delta.backbone, zoo=zoo, num_classes=classes) for _ in range(2))
    read = peft.load(folder, survey(bare))
    again = assemble(read.pieces, read.head, Origin(card=delta.backbone, task=task))
    a = _outputs(mine, delta, task, x)
    worst = float((a - _outputs(bare, again, task, x)).abs().max() / a.abs().max().clamp_min(1e-30))
    if not worst <= TOLERANCE:
        raise ExportMismatch(f"read back, the outputs differ by {worst:.1e} of the largest", "report this as a bug")
    return worst


def _outputs(model: nn.Module, delta: Delta, task: Task | None, x: torch.Tensor) -> torch.Tensor:
    return attach(model.double(), delta, task=task.name if task else "", check=False)(x.double())

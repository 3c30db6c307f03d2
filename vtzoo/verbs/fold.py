"""Write a delta into a plain timm folder, and prove that it is the same function."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vtzoo import talk
from vtzoo.artifact import CONFIG, WEIGHTS, Live, as_delta, fold_artifact, go_live, open_ref, plain_model
from vtzoo.backbone import config_json
from vtzoo.delta import Delta
from vtzoo.errors import FoldError, UsageError
from vtzoo.files import atomic_dir
from vtzoo.folding import Folded as LazyFolded
from vtzoo.lineage import record
from vtzoo.results import Folded
from vtzoo.speech import speaks
from vtzoo.tensors import write
from vtzoo.zoo import Zoo

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
PROBES = 4
TOLERANCE, HALF_TOLERANCE = 1e-5, 5e-2
"""What is allowed unless the user says otherwise: in float32 and float64, and in 16 bits, where each weight is rounded."""


def fold_ref(
    *, ref: str, out: Path, task: str | None = None, headless: bool = False, dtype: str = "float32", tolerance: float | None = None,
    factor: float = 1.0, zoo: Zoo | None = None, name: str | None = None,
) -> Folded:  # fmt: skip
    """Fold a delta or merge into a folder that plain timm loads.

    Args:
        ref: a delta or a merge.
        out: the folder to make; it appears only when it was verified.
        task: whose head, where there are several.
        headless: leave the head out.
        dtype: of the written weights.
        tolerance: largest allowed difference, relative to the attached model's largest output (float32); by default
            1e-5 for float32 and float64, 5e-2 for float16 and bfloat16.
        factor: how far to go from the backbone to the delta (WiSE-FT); 1 is the delta itself. Where it is another, the whole fold
            is compared with the delta first, and then the folder with a backbone given the same weights.
        zoo: where to look.
        name: also keep the result in the zoo.

    Raises:
        NotFoldable: no exact form in plain weights, and why.
        FoldError: the folded model's outputs differ by more than the tolerance.
        Conflict: `out` or `name` exists.
    """
    zoo = zoo or Zoo.find()
    if dtype not in DTYPES:
        raise UsageError(f"no dtype '{dtype}'", f"one of {', '.join(DTYPES)}")
    if not math.isfinite(factor):
        raise UsageError(
            f"a factor of {factor} leads nowhere", "0 is the backbone, 1 the delta, for example --factor 0.5"
        )
    if name:
        zoo.check_free("models", name)
    artifact = open_ref(ref, zoo)
    delta = as_delta(artifact)
    chosen = "" if headless or not delta.tasks else delta.task(task).name
    folded = fold_artifact(delta, zoo, chosen, factor)
    live = go_live(artifact, chosen, whole=any(map(speaks, delta.parts)))
    if factor != 1.0:  # no delta stands there to compare with, but one stands at its end
        classes = len(live.task.classes) if live.task else 0
        _compare(live, plain_model(delta, fold_artifact(delta, zoo, chosen), classes), tolerance, "float32")
        live = replace(live, model=plain_model(delta, folded, classes))
    part_of_the_way: dict[str, Any] = {} if factor == 1.0 else {"factor": factor}
    lineage = record("fold", [artifact.digest], **part_of_the_way)
    with atomic_dir(Path(out)) as folder:
        _write(folder, folded, delta, live, dtype, lineage)
        report = _verify(folder, live, tolerance, dtype)
    report["tensors"] = len(folded.changed)
    if factor != 1.0:
        report["factor"] = factor
        report["verified_on"] += (
            ", against the same weights before they were written, which at factor 1 are the delta's"
        )
    if name:
        _keep(zoo, name, Path(out), delta, live, report, lineage)
    talk.say(f"folded into {out}: largest relative difference {report['max_rel']:.1e}")
    return Folded(ref=name or artifact.ref, path=str(out), report=report)


def _write(folder: Path, folded: LazyFolded, delta: Delta, live: Live, dtype: str, lineage: Mapping[str, Any]) -> None:
    write(folder / WEIGHTS, folded, {"format": "pt"}, DTYPES[dtype])
    classes = live.task.classes if live.task else ()
    card = replace(live.card, preprocess=live.preprocess)
    config = config_json(live.model, card, classes, folded.all_args)
    made = {
        "method": delta.method,
        "backbone": delta.backbone.name,
        "fingerprint": delta.backbone.fingerprint,
        "tasks": [live.task.name] if live.task else [],
        **({"multilabel": True} if live.task and live.task.multilabel else {}),
    }
    config["vtzoo"] = {**lineage, **made}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@torch.inference_mode()
def _verify(folder: Path, live: Live, tolerance: float | None, dtype: str) -> dict[str, Any]:
    """Load with plain timm and compare on random images."""
    plain = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    report = _compare(live, plain, tolerance, dtype)
    return {**report, "verified_on": f"{PROBES} random images through plain timm", "dtype": dtype}


@torch.inference_mode()
def _compare(live: Live, plain: nn.Module, tolerance: float | None, dtype: str) -> dict[str, Any]:
    """Largest differences of two networks' outputs.

    Raises:
        FoldError: they are above the tolerance, or no numbers.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, *live.preprocess.input_size, generator=generator)
    a, b = live.model(x).double(), plain(x).double()
    if not bool(a.isfinite().all()):
        raise FoldError(
            "the network gives NaN or infinity with these weights", "choose a smaller --factor, or train again"
        )
    worst = (a - b).abs().max().item()
    relative = worst / max(a.abs().max().item(), 1e-30)
    half = DTYPES[dtype].itemsize < 4
    allowed = tolerance if tolerance is not None else HALF_TOLERANCE if half else TOLERANCE
    if not relative <= allowed:
        raise FoldError(
            f"folded and attached outputs differ by {relative:.1e} of the largest output (allowed {allowed:.1e})",
            f"{dtype} rounds every weight: pass a larger --tolerance, or --dtype float32"
            if half
            else "report this as a bug, or pass a larger --tolerance knowingly",
        )
    return {"max_abs": worst, "max_rel": relative, "tolerance": allowed}


def _keep(
    zoo: Zoo, name: str, out: Path, delta: Delta, live: Live, report: dict[str, Any], lineage: Mapping[str, Any]
) -> None:
    files = {n: zoo.add_object(out / n) for n in (WEIGHTS, CONFIG)}
    size = sum((out / n).stat().st_size for n in files)
    tasks = [live.task.name] if live.task else []
    zoo.put(
        "models",
        name,
        {
            "kind": "folded",
            "files": files,
            "size_bytes": size,
            "arch": delta.backbone.arch,
            "license": delta.backbone.license,
            "tasks": tasks,
            "metrics": {"max_rel": report["max_rel"]},
            "lineage": dict(lineage),
        },
    )

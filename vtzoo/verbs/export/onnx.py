"""Ship a model as ONNX, verified with onnxruntime before the file appears."""

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtzoo import talk
from vtzoo.artifact import Artifact, Live, go_live, open_ref
from vtzoo.errors import Conflict, ExportMismatch, NotFoldable, UsageError
from vtzoo.files import atomic_write
from vtzoo.results import Exported
from vtzoo.zoo import Zoo

BATCHES = (1, 2, 5)
OPSET = 18


def export_onnx(
    *,
    ref: str,
    out: Path,
    opset: int | None = None,
    tolerance: float = 1e-3,
    task: str | None = None,
    zoo: Zoo | None = None,
    name: str | None = None,
) -> Exported:
    """Export a delta (folded where it folds), merge, folded model, student or bare backbone.

    Args:
        ref: what to export.
        out: the file; it appears only when its outputs were verified at batch sizes 1, 2 and 5.
        opset: ONNX operator set, 18 unless given.
        tolerance: largest allowed difference, relative to the largest output.
        task: whose head, where there are several.
        zoo: where to look.
        name: also keep the file in the zoo.

    Returns:
        `report`: largest absolute and relative difference and top-1 agreement by batch size, and whether it was folded.

    Raises:
        ExportMismatch: onnxruntime's outputs differ by more than the tolerance.
        UsageError: the onnx extra is not installed.
        Conflict: the file exists.
    """
    zoo, out = zoo or Zoo.find(), Path(out)
    _ready(out)
    if name:
        zoo.check_free("models", name)
    artifact = open_ref(ref, zoo)
    live, folded = _live(artifact, task)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _convert(live, path, opset or OPSET, _metadata(artifact, live, folded=folded))
        report: dict[str, Any] = {
            "opset": opset or OPSET,
            "folded": folded,
            "tolerance": tolerance,
            "batches": _verify(live.model, path, live.preprocess.input_size, tolerance),
        }
        with atomic_write(out) as file:
            file.write(path.read_bytes())
    if name:
        _keep(zoo, name, out, live, artifact.digest)
    worst = max(b["max_rel"] for b in report["batches"])
    talk.say(f"exported {out}: largest relative difference {worst:.1e}")
    return Exported(ref=name or artifact.ref, path=str(out), report=report)


def _keep(zoo: Zoo, name: str, out: Path, live: Live, parent: str) -> None:
    digest = zoo.add_object(out)
    zoo.put(
        "models", name,
        {
            "kind": "export", "files": {"model.onnx": digest}, "size_bytes": out.stat().st_size, "arch": live.card.arch,
            "tasks": [live.task.name] if live.task else [], "metrics": {}, "lineage": {"verb": "export", "parents": [f"sha256:{parent}"]},
        },
    )  # fmt: skip


def _ready(out: Path) -> None:
    try:
        for needed in ("onnx", "onnxscript", "onnxruntime"):
            import_module(needed)
    except ImportError as error:
        raise UsageError(f"export onnx needs {error.name}", "pip install 'vtzoo[onnx]'") from error
    if out.exists():
        raise Conflict(f"{out} exists already", "choose another file name, or remove it")


def _live(artifact: Artifact, task: str | None) -> tuple[Live, bool]:
    if artifact.delta is None:
        return go_live(artifact, task), False
    try:
        return go_live(artifact, task, plain=True), True
    except NotFoldable as error:
        talk.say(f"exporting it attached: {error.message}")
        return go_live(artifact, task), False


def _metadata(artifact: Artifact, live: Live, *, folded: bool) -> dict[str, str]:
    shape = live.preprocess
    task = live.task
    return {
        "vtzoo.schema": "1",
        "vtzoo.ref": artifact.ref,
        "vtzoo.digest": artifact.digest,
        "vtzoo.backbone": live.card.name,
        "vtzoo.license": live.card.license,
        "vtzoo.folded": json.dumps(folded),
        "vtzoo.task": task.name if task else "",
        "vtzoo.classes": json.dumps(list(task.classes) if task else []),
        "vtzoo.multilabel": json.dumps(bool(task and task.multilabel)),
        "vtzoo.input": json.dumps({
            "layout": "NCHW", "dtype": "float32", "range": [0, 1], "size": list(shape.input_size), "mean": list(shape.mean),
            "std": list(shape.std), "interpolation": shape.interpolation, "crop_pct": shape.crop_pct,
        }),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "Normalized_0_1",
    }  # fmt: skip


def _convert(live: Live, path: Path, opset: int, metadata: dict[str, str]) -> None:
    import logging
    import warnings

    import onnx

    example = torch.zeros(2, *live.preprocess.input_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own advice; what counts is verified below
        torch.onnx.export(
            live.model.eval(), (example,), str(path), dynamo=True, external_data=False, opset_version=opset, input_names=["image"],
            output_names=["logits" if live.task else "features"], dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(path))


@torch.inference_mode()
def _verify(model: nn.Module, path: Path, size: tuple[int, int, int], tolerance: float) -> list[dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[dict[str, Any]] = []
    for batch in BATCHES:
        x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
        live = model(x).double()
        ran = torch.from_numpy(session.run(None, {"image": x.numpy()})[0]).double()
        worst = (live - ran).abs().max().item()
        relative = worst / max(live.abs().max().item(), 1e-30)
        agree = (live.argmax(-1) == ran.argmax(-1)).double().mean().item()
        if not relative <= tolerance:
            raise ExportMismatch(
                f"onnxruntime differs by {relative:.1e} of the largest output at batch size {batch} (allowed {tolerance:.1e})",
                "try another --opset, or pass a larger --tolerance knowingly",
            )
        found.append({"batch": batch, "max_abs": worst, "max_rel": relative, "top1_agreement": agree})
    return found

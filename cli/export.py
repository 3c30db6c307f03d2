"""Write a model for another runtime or file format."""

from pathlib import Path
from typing import Annotated

import typer

from . import _results
from ._options import Keep, Ref, Task
from ._session import Session

File = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]


def onnx(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: File,
    task: Task = None,
    opset: Annotated[
        int | None, typer.Option("--opset", metavar="N", help="ONNX operator set (default: the exporter's).")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", metavar="X", min=0, help="Largest relative difference allowed, onnxruntime against torch."
        ),
    ] = 1e-3,
    name: Keep = None,
) -> None:
    """Write ONNX with a free batch size, checked with onnxruntime before the file appears."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.onnx import export_onnx

    result = export_onnx(ref=ref, out=out, opset=opset, tolerance=tolerance, task=task, zoo=zoo, name=name)
    session.show(result, _results.exported)


def timm(ctx: typer.Context, *, ref: Ref, out: Folder, task: Task = None) -> None:
    """Write a folded model or a student as a folder that plain timm loads."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.timm import export_timm

    session.show(export_timm(ref=ref, out=out, task=task, zoo=zoo), _results.exported)


def safetensors(ctx: typer.Context, *, ref: Ref, out: File) -> None:
    """Write the tensors of any entry as one safetensors file."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.safetensors import export_safetensors

    session.show(export_safetensors(ref=ref, out=out, zoo=zoo), _results.exported)


def peft(ctx: typer.Context, *, ref: Ref, out: Folder, task: Task = None) -> None:
    """Write a delta as a folder that PEFT loads, checked by reading it back before the folder appears."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.peft import export_peft

    session.show(export_peft(ref=ref, out=out, task=task, zoo=zoo), _results.exported)


COMMANDS = (
    ("onnx", onnx, ("vtzoo export onnx fashion/lora fashion.onnx",)),
    ("timm", timm, ("vtzoo export timm fashion/folded fashion-timm/",)),
    ("peft", peft, ("vtzoo export peft fashion/lora fashion-peft/",)),
    ("safetensors", safetensors, ("vtzoo export safetensors fashion/lora fashion.safetensors",)),
)

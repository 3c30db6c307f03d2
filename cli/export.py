"""Write a model for another runtime or file format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vtzoo.errors import UsageError

from . import _results
from ._options import Keep, Ref, Task, by_task
from ._session import Session

File = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Opset = Annotated[int | None, typer.Option("--opset", metavar="N", help="ONNX operator set, 17 to 23 (default: 18).")]
DynamicSize = Annotated[bool, typer.Option("--dynamic-size", help="Take images of other heights and widths, too.")]
Embed = Annotated[
    bool,
    typer.Option("--embed-preprocess", help="Take uint8 pictures [n, h, w, 3] and normalise them in the graph."),
]
Half = Annotated[bool, typer.Option("--half", help="float16 inside.")]
Int8 = Annotated[
    Literal["dynamic", "static"] | None,
    typer.Option("--int8", help="int8 inside; ranges found as images come (dynamic), or on --data (static)."),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[TASK=]DATA",
        help="Images to verify with, and to find ranges on; labels don't matter. With --multi-task once for each task, or once for all.",
    ),
]
Calibrate = Annotated[
    int | None, typer.Option("--calibrate", metavar="N", help="How many images find ranges (default: 100).")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        min=0,
        help="Largest difference allowed, relative to the largest output (default: 0.001); of --half and --int8 how far the "
        "outputs' cosine may stand below 1 (0.001 and 0.01).",
    ),
]
Verify = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="Images to verify with; labels don't matter.")
]
Largest = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        min=0,
        help="Largest difference allowed, relative to the largest output (default: 0.001).",
    ),
]
MultiTask = Annotated[
    bool, typer.Option("--multi-task", help="One file for all tasks, each image's task given as task_id.")
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="REF", help="With --multi-task: further deltas of the same backbone; may be repeated."
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="With --multi-task: tell size and time of a file for each task, too.")
]


def onnx(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: File,
    task: Task = None,
    opset: Opset = None,
    dynamic_size: DynamicSize = False,
    embed_preprocess: Embed = False,
    half: Half = False,
    int8: Int8 = None,
    data: Images = None,
    calibrate: Calibrate = None,
    tolerance: Tolerance = None,
    multi_task: MultiTask = False,
    more: With = None,
    compare: Compare = False,
    name: Keep = None,
) -> None:
    """Write ONNX with a free batch size, checked with onnxruntime before the file appears."""
    session = Session.of(ctx)
    if multi_task or more or compare:
        alone = {
            "--task": task,
            "--dynamic-size": dynamic_size,
            "--half": half,
            "--int8": int8,
            "--calibrate": calibrate,
        }
        _only_many([n for n, v in alone.items() if v], multi_task=multi_task)
        zoo = session.zoo(ref, *(more or ()))
        from vtzoo.verbs.export.tasks import export_tasks

        result = export_tasks(
            refs=[ref, *(more or ())], out=out, opset=opset, tolerance=tolerance, embed_preprocess=embed_preprocess, compare=compare,
            data=by_task(data) if data else None, zoo=zoo, name=name,
        )  # fmt: skip
        session.show(result, _results.exported)
        return
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.onnx import export_onnx

    result = export_onnx(
        ref=ref, out=out, opset=opset, tolerance=tolerance, task=task, dynamic_size=dynamic_size, embed_preprocess=embed_preprocess,
        half=half, int8=int8, data=_one(data), calibrate=calibrate, zoo=zoo, name=name,
    )  # fmt: skip
    session.show(result, _results.exported)


def _only_many(alone: Sequence[str], *, multi_task: bool) -> None:
    """Refuse options of which some are of one task, others of many."""
    if not multi_task:
        raise UsageError("--with and --compare are of a file of many tasks", "add --multi-task")
    if alone:
        raise UsageError(f"{' and '.join(alone)} and --multi-task don't go together", "leave one of them out")


def _one(data: list[str] | None) -> str | None:
    """The images of one task.

    Raises:
        UsageError: several, or with a task before them.
    """
    if not data:
        return None
    found = by_task(data) if len(data) == 1 else None
    if isinstance(found, str):
        return found
    raise UsageError(
        "one task has images once, without its name", "give --data DATA once, or add --multi-task to --data TASK=DATA"
    )


def _program(ctx: typer.Context, form: str, ref: str, out: Path, name: str | None, **wish: Any) -> None:
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.export.program import export_program

    session.show(export_program(form=form, ref=ref, out=out, zoo=zoo, name=name, **wish), _results.exported)


def pt2(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: File,
    task: Task = None,
    dynamic_size: DynamicSize = False,
    embed_preprocess: Embed = False,
    data: Verify = None,
    tolerance: Largest = None,
    name: Keep = None,
) -> None:
    """Write a program that torch alone runs (torch.export), checked before the file appears."""
    _program(
        ctx, "pt2", ref, out, name, task=task, dynamic_size=dynamic_size, embed_preprocess=embed_preprocess, data=data, tolerance=tolerance,
    )  # fmt: skip


def openvino(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: Annotated[
        Path, typer.Argument(metavar="OUT.xml", help="The file to write; its weights go beside it, in .bin.")
    ],
    task: Task = None,
    dynamic_size: DynamicSize = False,
    embed_preprocess: Embed = False,
    half: Annotated[bool, typer.Option("--half", help="float16 weights.")] = False,
    data: Verify = None,
    tolerance: Largest = None,
    name: Keep = None,
) -> None:
    """Write OpenVINO's pair of files, checked with OpenVINO before they appear."""
    _program(
        ctx, "openvino", ref, out, name, task=task, dynamic_size=dynamic_size, embed_preprocess=embed_preprocess, half=half, data=data,
        tolerance=tolerance,
    )  # fmt: skip


def executorch(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: File,
    task: Task = None,
    embed_preprocess: Embed = False,
    max_batch: Annotated[int, typer.Option("--max-batch", metavar="N", min=2, help="The largest batch.")] = 8,
    data: Verify = None,
    tolerance: Largest = None,
    name: Keep = None,
) -> None:
    """Write a program for phones and small devices (ExecuTorch on XNNPACK), checked with its runtime before the file appears."""
    _program(
        ctx, "executorch", ref, out, name, task=task, embed_preprocess=embed_preprocess, max_batch=max_batch, data=data, tolerance=tolerance
    )  # fmt: skip


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
    (
        "onnx",
        onnx,
        (
            "vtzoo export onnx fashion/lora fashion.onnx",
            "vtzoo export onnx fashion/lora fashion.onnx --embed-preprocess --int8 static --data photos/",
            "vtzoo export onnx fashion/lora many.onnx --multi-task --with emoji/vpt --with clipart/adapter",
            "vtzoo export onnx both many.onnx --multi-task --data fashion=vtzoo:fashion --data emoji=vtzoo:emoji",
        ),
    ),
    (
        "pt2",
        pt2,
        ("vtzoo export pt2 fashion/lora fashion.pt2", "vtzoo export pt2 fashion/lora fashion.pt2 --embed-preprocess"),
    ),
    ("openvino", openvino, ("vtzoo export openvino fashion/lora fashion.xml --half",)),
    ("executorch", executorch, ("vtzoo export executorch fashion/lora fashion.pte --max-batch 4",)),
    ("timm", timm, ("vtzoo export timm fashion/folded fashion-timm/",)),
    ("peft", peft, ("vtzoo export peft fashion/lora fashion-peft/",)),
    ("safetensors", safetensors, ("vtzoo export safetensors fashion/lora fashion.safetensors",)),
)

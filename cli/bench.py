"""`vtzoo bench`."""

from typing import Annotated

import typer

from . import _results
from ._options import Ref, Task
from ._session import Session

EXAMPLES = (
    "vtzoo bench fashion/lora --batch 1 --batch 32",
    "vtzoo bench fashion/lora --form torch --form openvino --form executorch",
    "vtzoo bench ./fashion.onnx --threads 4",
)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    task: Task = None,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", metavar="N", min=1, help="Images at once; may be given several times (default: 1 and 8)."
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", metavar="N", min=0, help="Of torch and other runtimes; 0 for as many as torch takes."
        ),
    ] = 1,
    forms: Annotated[
        list[str] | None,
        typer.Option(
            "--form",
            metavar="FORM",
            help="What is timed: torch, folded, onnx, pt2, openvino or executorch; may be given several times (default: the first three, as far as there are such).",
        ),
    ] = None,
) -> None:
    """Time a delta, merge, model, backbone or exported file on this machine."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.bench import bench

    result = bench(ref=ref, task=task, batches=batches or (1, 8), threads=threads, forms=forms or (), zoo=zoo)
    session.show(result, _results.benched)

"""`vtzoo predict`."""

from typing import Annotated

import typer

from . import _results
from ._options import Ref, Task, TestTime
from ._session import Session

EXAMPLES = ("vtzoo predict fashion/lora photo.jpg --top 3",)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    task: Task = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many classes to name.")] = 5,
    test_time: TestTime = None,
) -> None:
    """Name the most probable classes of images."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.predict import predict

    result = predict(ref=ref, images=images, task=task, top=top, zoo=zoo, test_time=test_time)
    session.show(result, _results.predicted)

"""`vtzoo eval`."""

from typing import Annotated, Literal

import typer

from . import _results
from ._options import Data, Ref, SkipBad, Task, TestTime
from ._session import Session

EXAMPLES = ("vtzoo eval fashion/lora --data vtzoo:fashion",)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    data: Data,
    task: Task = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images per step.")] = 64,
    skip_bad: SkipBad = False,
    split: Annotated[Literal["train", "val", "test"], typer.Option("--split", help="Which part of the data.")] = "test",
    test_time: TestTime = None,
) -> None:
    """Measure a delta, merge or model on test images."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.evaluate import evaluate

    result = evaluate(
        ref=ref, data=data, task=task, zoo=zoo, batch_size=batch_size, skip_bad=skip_bad, split=split, test_time=test_time,
    )  # fmt: skip
    session.show(result, _results.evaluated)

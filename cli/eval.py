"""`vtzoo eval`."""

from typing import Annotated, Literal

import typer

from . import _options as o
from . import _results
from ._options import Data, Ref, SkipBad, Task
from ._session import Session

EXAMPLES = (
    "vtzoo eval fashion/lora --data vtzoo:fashion",
    "vtzoo eval clip:ViT-B-32.laion2b_s34b_b79k --data photos/ --template 'a photo of a {}.'",
    "vtzoo eval photos/coop --data other/ --open-vocabulary",
    "vtzoo eval photos/coop --data photos/ --test-time 'tpt[views=64]'",
)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    data: Data,
    task: Task = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images per step.")] = 64,
    skip_bad: SkipBad = False,
    split: Annotated[Literal["train", "val", "test"], typer.Option("--split", help="Which part of the data.")] = "test",
    classes: Annotated[
        Literal["all", "base", "new"], typer.Option("--classes", help="All of them, or the first or second half.")
    ] = "all",
    open_vocabulary: Annotated[
        bool, typer.Option("--open-vocabulary", help="Name the data's own classes to the text tower.")
    ] = False,
    base_to_new: Annotated[
        bool, typer.Option("--base-to-new", help="Both halves of the classes, and their harmonic mean.")
    ] = False,
    words: o.Words = None,
    templates: o.Templates = None,
    test_time: o.TestTime = None,
) -> None:
    """Measure a delta, merge or model on test images."""
    session = Session.of(ctx)
    zoo = session.zoo(ref)
    from vtzoo.verbs.evaluate import evaluate
    from vtzoo.vocabulary import Naming

    named = open_vocabulary or words is not None or bool(templates)
    result = evaluate(
        ref=ref, data=data, task=task, zoo=zoo, batch_size=batch_size, skip_bad=skip_bad, split=split, classes=classes,
        naming=Naming(o.words(words), tuple(templates or ())) if named else None, base_to_new=base_to_new, test_time=test_time,
    )  # fmt: skip
    session.show(result, _results.evaluated)

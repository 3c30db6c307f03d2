"""`vtzoo zero-shot`."""

from typing import Annotated

import typer

from . import _options as o
from . import _results
from ._session import Session

EXAMPLES = (
    "vtzoo zero-shot --backbone clip:ViT-B-32.laion2b_s34b_b79k --data photos/ --name photos/zero-shot",
    "vtzoo zero-shot --backbone REF --classes 'tabby cat,dog' --template 'a drawing of a {}.' --name pets/zero-shot",
)


def run(
    ctx: typer.Context,
    *,
    backbone: Annotated[str, typer.Option("--backbone", metavar="REF", help="The dual encoder.")],
    name: o.Name,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="Images whose classes it names.")] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B", help="Classes, where there are no images.")
    ] = None,
    words: o.Words = None,
    templates: o.Templates = None,
    image_size: o.ImageSize = None,
    skip_bad: o.SkipBad = False,
) -> None:
    """Make a classifier of class names, without training."""
    session = Session.of(ctx)
    labels = [part.strip() for part in classes.split(",")] if classes else []
    zoo = session.zoo()
    from vtzoo.verbs.zero_shot import zero_shot

    result = zero_shot(
        backbone=backbone, name=name, data=data, classes=labels, words=o.words(words), templates=templates or (),
        image_size=image_size, skip_bad=skip_bad, zoo=zoo,
    )  # fmt: skip
    session.show(result, _results.trained)

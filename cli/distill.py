"""`vtzoo distill`."""

from typing import Annotated

import typer

from . import _options as o
from . import _results
from ._session import Session

EXAMPLES = (
    "vtzoo distill --teacher fashion/lora --student mobilenetv4_conv_small --data vtzoo:fashion --name fashion/kd",
)


def run(
    ctx: typer.Context,
    *,
    teachers: Annotated[
        list[str], typer.Option("--teacher", metavar="REF", help="Who teaches; may be given several times.")
    ],
    student: Annotated[
        str,
        typer.Option(
            "--student",
            metavar="ARCH|REF",
            help="A timm architecture, starting from random weights, or a backbone, a model or a tagged timm name, from its own.",
        ),
    ],
    data: o.Data,
    name: o.Name,
    loss: Annotated[str, typer.Option("--loss", metavar="SPEC", help="What is taught (see vtzoo losses).")] = "kd",
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="Whose head teaches, if not the one with the data's classes."),
    ] = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    precision: o.Precision = None,
    seed: o.Seed = None,
    config: o.Config = None,
    sets: o.Sets = None,
    resume: o.Resume = False,
    skip_bad: o.SkipBad = False,
    views: Annotated[int, typer.Option("--views", metavar="N", min=1, help="Crops of each image that are taught.")] = 4,
    teacher_size: Annotated[
        int | None,
        typer.Option(
            "--teacher-size", metavar="PIXELS", min=8, help="Side at which a bare convolutional teacher looks."
        ),
    ] = None,
) -> None:
    """Teach a small network what any entry knows."""
    session = Session.of(ctx)
    recipe = o.recipe(
        config,
        sets,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        image_size=image_size,
        precision=precision,
        seed=seed,
    )
    o.check_spec("losses", loss)
    zoo = session.zoo(*teachers)
    from vtzoo.verbs.distill import distill

    result = distill(
        teachers=teachers, student=student, data=data, loss=loss, name=name, task=task, zoo=zoo, recipe=recipe,
        resume=resume, skip_bad=skip_bad, views=views, teacher_size=teacher_size,
    )  # fmt: skip
    session.show(result, _results.distilled)

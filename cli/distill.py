"""`vtzoo distill`."""

from typing import Annotated

import typer

from . import _options as o
from . import _results
from ._session import Session

EXAMPLES = (
    "vtzoo distill --teacher fashion/lora --student mobilenetv4_conv_small --data vtzoo:fashion --name fashion/kd",
    "vtzoo distill --teacher all-in-one --student test_efficientnet --data fashion=vtzoo:fashion --data emoji=vtzoo:emoji --name small",
)


Teachers = Annotated[
    list[str], typer.Option("--teacher", metavar="REF", help="Who teaches; may be given several times.")
]
Student = Annotated[
    str,
    typer.Option(
        "--student",
        metavar="ARCH|REF",
        help="A timm architecture, starting from random weights, or a backbone, a model or a tagged timm name, from its own; or slim[macs=0.5], made of its teacher; or dna[latency_ms=2], searched for with it.",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="[TASK=]DATA", help="Images (see vtzoo train); of several tasks given once for each."
    ),
]
Loss = Annotated[
    str, typer.Option("--loss", metavar="SPEC", help="What is taught, or a sum: kd+0.5*feature (see vtzoo losses).")
]
Whose = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Whose head teaches, if not the one with the data's classes."),
]
Views = Annotated[
    int, typer.Option("--views", metavar="N", min=0, help="Crops of each image that are taught, shown in turn.")
]
TeacherSize = Annotated[
    int | None,
    typer.Option("--teacher-size", metavar="PIXELS", min=8, help="Side at which convolutional teachers look."),
]
Baseline = Annotated[
    bool, typer.Option("--baseline", help="Train the same student without a teacher, too, for as long.")
]
Check = Annotated[
    int,
    typer.Option(
        "--check-cache", metavar="N", min=0, help="Ask the teachers again for N of the kept answers, and compare."
    ),
]

Init = Annotated[
    str | None,
    typer.Option(
        "--init", metavar="SPEC", help="How the student gets its first weights from another network (see vtzoo inits)."
    ),
]
InitFrom = Annotated[
    str | None, typer.Option("--init-from", metavar="REF", help="From which; the first teacher unless given.")
]

Latency = Annotated[bool, typer.Option("--latency", help="Time student and teachers in onnxruntime, too.")]


def run(
    ctx: typer.Context,
    *,
    teachers: Teachers,
    student: Student,
    data: Data,
    name: o.Name,
    loss: Loss = "kd",
    task: Whose = None,
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
    views: Views = 4,
    teacher_size: TeacherSize = None,
    baseline: Baseline = False,
    check_cache: Check = 0,
    init: Init = None,
    init_from: InitFrom = None,
    latency: Latency = False,
) -> None:
    """Teach a small network what any entries know."""
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
    if init:
        o.check_spec("inits", init)
    zoo = session.zoo(*teachers)
    from vtzoo.verbs.distill import distill

    result = distill(
        teachers=teachers, student=student, data=o.by_task(data), loss=loss, name=name, task=task, zoo=zoo, recipe=recipe,
        resume=resume, skip_bad=skip_bad, views=views, teacher_size=teacher_size, baseline=baseline, check=check_cache,
        init=init, init_from=init_from, latency=latency, awaited=session.awaited,
    )  # fmt: skip
    session.show(result, _results.distilled)

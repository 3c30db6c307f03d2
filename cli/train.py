"""`vtzoo train`."""

from typing import Annotated

import typer

from . import _options as o
from . import _results
from ._session import Session

EXAMPLES = (
    "vtzoo train --backbone tf_efficientnet_lite0 --data vtzoo:fashion --method lora --name fashion/lora",
    "vtzoo train --backbone REF --data photos/ --method 'lora[rank=8]+bitfit' --name NAME --epochs 20 --set mixup=0.2",
    "vtzoo train --backbone REF --data photos/ --method lora --name NAME --recipe few-shot --set shots=4",
)


def run(
    ctx: typer.Context,
    *,
    backbone: Annotated[str, typer.Option("--backbone", metavar="REF", help="The frozen network under it.")],
    data: o.Data,
    name: o.Name,
    method: Annotated[
        str, typer.Option("--method", metavar="SPEC", help="What to train (see vtzoo methods).")
    ] = "linear",
    head: Annotated[str | None, typer.Option("--head", metavar="SPEC", help="linear, or mlp[…].")] = None,
    preset: o.Preset = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    precision: o.Precision = None,
    seed: o.Seed = None,
    config: o.Config = None,
    sets: o.Sets = None,
    resume: o.Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and check everything, train nothing.")] = False,
    skip_bad: o.SkipBad = False,
    track: o.Track = None,
    words: o.Words = None,
    templates: o.Templates = None,
) -> None:
    """Train a delta and its head on a frozen backbone."""
    session = Session.of(ctx)
    recipe = o.recipe(
        config,
        sets,
        preset=preset,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        image_size=image_size,
        precision=precision,
        seed=seed,
    )
    o.check_spec("methods", method)
    o.check_preset(recipe)
    zoo = session.zoo()
    from vtzoo.verbs.train import train

    result = train(
        backbone=backbone, data=data, method=method, name=name, zoo=zoo, recipe=recipe, head=head,
        resume=resume, dry_run=dry_run, skip_bad=skip_bad, track=track or (), awaited=session.awaited,
        words=o.words(words), templates=templates or (),
    )  # fmt: skip
    session.show(result, _results.trained)

"""Bring another library's adapter into the zoo as a delta."""

from pathlib import Path
from typing import Annotated

import typer

from . import _results
from ._options import FromPickle, Name
from ._session import Session

Backbone = Annotated[str, typer.Option("--backbone", metavar="REF", help="The backbone it was trained on.")]
Classes = Annotated[Path | None, typer.Option("--classes", metavar="FILE", help="Its labels, one a line.")]
TaskName = Annotated[str | None, typer.Option("--task", metavar="TASK", help="What to call its task.")]


def peft(
    ctx: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What PEFT's save_pretrained wrote.")],
    backbone: Backbone,
    name: Name,
    task: TaskName = None,
    classes: Classes = None,
    from_pickle: FromPickle = False,
) -> None:
    """Keep PEFT's adapter folder as a delta of its backbone."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.verbs.bring.peft import import_peft

    result = import_peft(
        folder=folder, backbone=backbone, name=name, task=task, classes=classes, from_pickle=from_pickle, zoo=zoo
    )
    session.show(result, _results.imported)


def lycoris(
    ctx: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="What LyCORIS or kohya's scripts wrote.")],
    backbone: Backbone,
    name: Name,
    from_pickle: FromPickle = False,
) -> None:
    """Keep an adapter in LyCORIS' form as a delta of its backbone."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.verbs.bring.lycoris import import_lycoris

    result = import_lycoris(file=file, backbone=backbone, name=name, from_pickle=from_pickle, zoo=zoo)
    session.show(result, _results.imported)


COMMANDS = (
    ("peft", peft, ("vtzoo import peft pets-peft/ --backbone my-vit --name pets/peft --classes pets.txt",)),
    ("lycoris", lycoris, ("vtzoo import lycoris pets.safetensors --backbone my-vit --name pets/lycoris",)),
)

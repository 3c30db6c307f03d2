"""`vtzoo init`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._blocks import Block, Line
from ._session import Session

EXAMPLES = ("vtzoo init", "vtzoo init ~/zoo")


def run(
    ctx: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where (default: here).")] = Path(),
) -> None:
    """Make a folder a zoo: an index and a place for objects."""
    from vtzoo.zoo import Zoo

    zoo = Zoo.init(folder)
    Session.of(ctx).show({"path": str(zoo.root)}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"a new zoo in {facts['path']}")]

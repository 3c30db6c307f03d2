"""`vtzoo mv`."""

from typing import Annotated, Any

import typer

from ._blocks import Block, Line
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo mv fashion/lora fashion/first",)


def run(
    ctx: typer.Context, *, ref: Ref, new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")]
) -> None:
    """Give an entry another name."""
    session = Session.of(ctx)
    zoo = session.zoo()
    entry = zoo.resolve(ref)
    zoo.rename(entry, new)
    session.show({"ref": new, "was": entry.name, "section": entry.section}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"{facts['was']} is now {facts['ref']}")]

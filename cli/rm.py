"""`vtzoo rm`."""

from typing import Annotated, Any

import typer

from ._blocks import Block, Line
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo rm fashion/lora",)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    force: Annotated[bool, typer.Option("--force", help="Also a backbone whose weights deltas here need.")] = False,
) -> None:
    """Remove an entry and the objects that only it refers to."""
    session = Session.of(ctx)
    zoo = session.zoo()
    entry = zoo.resolve(ref)
    zoo.remove(entry, force=force)
    session.show({"ref": entry.name, "section": entry.section}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"removed {facts['ref']} from {facts['section']}")]

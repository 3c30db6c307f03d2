"""`vtzoo rm`."""

from typing import Annotated, Any

import typer

from vtzoo.errors import NotFound
from vtzoo.refs import shown

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
    if ref.partition("@")[0] != entry.name:  # 'rm x' a second time must not take x-2
        raise NotFound(f"no entry is called {shown(ref)}", f"removing takes a name in full: vtzoo rm {entry.name}")
    zoo.remove(entry, force=force)
    session.show({"ref": entry.name, "section": entry.section}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"removed {facts['ref']} from {facts['section']}")]

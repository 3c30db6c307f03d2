"""`vtzoo fsck`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ._blocks import Block, Line, Table
from ._session import Session

EXAMPLES = ("vtzoo fsck", "vtzoo fsck --rebuild")


def run(
    ctx: typer.Context,
    *,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the index again: of itself, its copies and deltas' headers.")
    ] = False,
) -> None:
    """Tell what is damaged or missing (exit code 4), or mend the index."""
    session = Session.of(ctx)
    from vtzoo import fsck
    from vtzoo.zoo import Zoo

    zoo = Zoo(session.zoo_path) if session.zoo_path else Zoo.find()  # not read yet: it may be what is damaged
    if rebuild:
        made = fsck.rebuild(zoo)
        session.show({**asdict(made), "aside": str(made.aside or "")}, _rebuilt)
        return
    found = fsck.look(zoo)
    session.show([asdict(f) for f in found], _found)
    if any(f.kind == "error" for f in found):
        raise typer.Exit(4)


def _found(found: list[dict[str, Any]]) -> list[Block]:
    rows = [(f["kind"], f["what"], f["said"], f["hint"]) for f in found]
    return [Table(("kind", "what", "seen", "next"), rows)] if rows else [Line("all is well")]


def _rebuilt(facts: dict[str, Any]) -> list[Block]:
    rows = [(name, source) for name, source in facts["found"].items()]
    lost = [(name, "its objects are missing") for name in facts["lost"]]
    blocks: list[Block] = [Table(("entry", "from"), [*rows, *lost])] if rows or lost else []
    aside = f", the old one is {facts['aside']}" if facts["aside"] else ""
    return [*blocks, Line(f"{facts['kept']} entries kept, {len(rows)} found again, {len(lost)} lost{aside}")]

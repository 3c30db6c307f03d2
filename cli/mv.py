"""`vtzoo mv`."""

from typing import Annotated, Any

import typer

from vtzoo.errors import UsageError

from ._blocks import Block, Line
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo mv fashion/lora fashion/first", "vtzoo mv fashion/lora fashion/first --task fashion=fashion-first")


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name; the old one again to keep it.")],
    task: Annotated[
        str | None, typer.Option("--task", metavar="OLD=NEW", help="Also rename a task of the delta.")
    ] = None,
) -> None:
    """Give an entry another name, and a task of it."""
    session = Session.of(ctx)
    before, equals, after = (task or "").partition("=")
    if task is not None and not (before and equals and after):
        raise UsageError(f"--task '{task}' is not OLD=NEW", "for example --task fashion=fashion-2")
    zoo = session.zoo()
    entry = zoo.resolve(ref)
    if new != entry.name or task is None:
        zoo.check_free(entry.section, new)
    if task is not None:
        from vtzoo.verbs.rename import rename_task

        rename_task(ref=entry.name, old=before, new=after, zoo=zoo)
    if new != entry.name:
        zoo.rename(zoo.resolve(entry.name, entry.section), new)
    session.show({"ref": new, "was": entry.name, "section": entry.section}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"{facts['was']} is now {facts['ref']}")]

"""`vtzoo merges`."""

from typing import Annotated

import typer

from vtzoo import registry

from . import _cards
from ._session import Session

EXAMPLES = ("vtzoo merges", "vtzoo merges ties")


def run(
    ctx: typer.Context,
    *,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One merge's page.")] = None,
) -> None:
    """List the merges, or show one: its knobs, paper and formula."""
    session = Session.of(ctx)
    if name is None:
        session.show([_cards.facts(c, "merges") for c in registry.cards("merges")], _cards.table)
    else:
        session.show(_cards.facts(registry.card("merges", name), "merges"), _cards.page)

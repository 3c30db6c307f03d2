"""`vtzoo losses`."""

from typing import Annotated

import typer

from vtzoo import registry

from . import _cards
from ._session import Session

EXAMPLES = ("vtzoo losses", "vtzoo losses kd")


def run(
    ctx: typer.Context, *, name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One loss's page.")] = None
) -> None:
    """List the losses, or show one: its knobs, paper and formula."""
    session = Session.of(ctx)
    if name is None:
        session.show([_cards.facts(c, "losses") for c in registry.cards("losses")], _cards.table)
    else:
        session.show(_cards.facts(registry.card("losses", name), "losses"), _cards.page)

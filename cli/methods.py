"""`vtzoo methods`."""

from typing import Annotated

import typer

from vtzoo import registry

from . import _cards
from ._session import Session

EXAMPLES = ("vtzoo methods", "vtzoo methods lora")


def run(
    ctx: typer.Context,
    *,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method's page.")] = None,
) -> None:
    """List the methods, or show one: its knobs, paper and formula."""
    session = Session.of(ctx)
    if name is None:
        session.show([_cards.facts(c, "methods") for c in registry.cards("methods")], _cards.table)
    else:
        session.show(_cards.facts(registry.card("methods", name), "methods"), _cards.page)

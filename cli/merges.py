"""`vtzoo merges`."""

import typer

from . import _cards
from ._session import Session, optional

EXAMPLES = ("vtzoo merges", "vtzoo merges ties")
USAGE = "[NAME]"


def run(ctx: typer.Context) -> None:
    """List the merges, or show one: its knobs, paper and formula."""
    _cards.answer(Session.of(ctx), "merges", optional(ctx))

"""`vtzoo losses`."""

import typer

from . import _cards
from ._session import Session, optional

EXAMPLES = ("vtzoo losses", "vtzoo losses kd")
USAGE = "[NAME]"


def run(ctx: typer.Context) -> None:
    """List the losses, or show one: its knobs, paper and formula."""
    _cards.answer(Session.of(ctx), "losses", optional(ctx))

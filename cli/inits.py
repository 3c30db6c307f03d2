"""`vtzoo inits`."""

import typer

from . import _cards
from ._session import Session, optional

EXAMPLES = ("vtzoo inits", "vtzoo inits net2net")
USAGE = "[NAME]"


def run(ctx: typer.Context) -> None:
    """List how a student gets its first weights, or show one way."""
    _cards.answer(Session.of(ctx), "inits", optional(ctx))

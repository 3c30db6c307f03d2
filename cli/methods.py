"""`vtzoo methods`."""

import typer

from . import _cards
from ._session import Session, optional

EXAMPLES = ("vtzoo methods", "vtzoo methods lora")
USAGE = "[NAME]"


def run(ctx: typer.Context) -> None:
    """List the methods, or show one: its knobs, paper and formula."""
    _cards.answer(Session.of(ctx), "methods", optional(ctx))

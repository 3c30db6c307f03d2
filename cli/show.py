"""`vtzoo show`."""

import typer

from . import _entries
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo show fashion/lora", "vtzoo show fashion/lora --json")


def run(ctx: typer.Context, *, ref: Ref) -> None:
    """Show what an entry is, what made it, and how good it is."""
    session = Session.of(ctx)
    session.show(_entries.described(session, ref), _entries.page)

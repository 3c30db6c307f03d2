"""`vtzoo ls`."""

from typing import Annotated

import typer

from vtzoo.errors import UsageError, did_you_mean

from . import _entries
from ._session import Session

EXAMPLES = ("vtzoo ls", "vtzoo ls deltas --json")


def run(
    ctx: typer.Context,
    *,
    section: Annotated[
        str | None, typer.Argument(metavar="[backbones|deltas|models]", help="Which entries (default: all).")
    ] = None,
) -> None:
    """List the entries of the zoo and of its catalogue."""
    if section is not None and section not in _entries.SECTIONS:
        raise UsageError(f"no section is called '{section}'", did_you_mean(section, _entries.SECTIONS))
    session = Session.of(ctx)
    entries = session.zoo().entries(section)
    session.show([_entries.listed(e) for e in entries], _entries.tables)

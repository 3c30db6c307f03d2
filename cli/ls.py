"""`vtzoo ls`."""

import typer

from vtzoo.errors import UsageError, did_you_mean
from vtzoo.refs import SECTIONS

from . import _entries
from ._session import Session, optional

EXAMPLES = ("vtzoo ls", "vtzoo ls deltas --json")
USAGE = "[backbones|deltas|models]"


def run(ctx: typer.Context) -> None:
    """List the entries of the zoo and of its catalogue."""
    section = optional(ctx)
    if section is not None and section not in SECTIONS:
        raise UsageError(f"no section is called '{section}'", did_you_mean(section, SECTIONS))
    session = Session.of(ctx)
    entries = session.zoo().entries(section)
    session.show([_entries.listed(e) for e in entries], _entries.tables)

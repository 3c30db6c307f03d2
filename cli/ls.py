"""`vtzoo ls`."""

import typer

from vtzoo.errors import UsageError, did_you_mean
from vtzoo.refs import SECTIONS, is_path

from . import _entries
from ._session import Session, optional

EXAMPLES = ("vtzoo ls", "vtzoo ls deltas --json", "vtzoo ls s3://bucket/zoo", "vtzoo ls /mnt/zoo")
USAGE = "[backbones|deltas|models|REMOTE]"


def run(ctx: typer.Context) -> None:
    """List the entries of the zoo and of its catalogue, or of a zoo elsewhere."""
    what = optional(ctx)
    session = Session.of(ctx)
    if what is not None and ("://" in what or is_path(what)):
        entries = _entries.elsewhere(what)
    elif what is None or what in SECTIONS:
        entries = session.zoo().entries(what)
    else:
        raise UsageError(f"no section is called '{what}'", did_you_mean(what, SECTIONS))
    session.show([_entries.listed(e) for e in entries], _entries.tables)

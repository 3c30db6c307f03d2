"""`vtzoo show`."""

from typing import Annotated

import typer

from . import _entries
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo show fashion/lora", "vtzoo show fashion/lora --json", "vtzoo show fashion/lora s3://bucket/zoo")


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    remote: Annotated[str | None, typer.Argument(metavar="[REMOTE]", help="The zoo elsewhere that has it.")] = None,
) -> None:
    """Show what an entry is, what made it, and how good it is."""
    session = Session.of(ctx)
    facts = _entries.described(session, ref) if remote is None else _entries.described_elsewhere(ref, remote)
    session.show(facts, _entries.page)

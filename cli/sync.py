"""`vtzoo sync`."""

import typer

from ._session import Session
from ._shares import DryRun, Remote, shared

EXAMPLES = ("vtzoo sync s3://bucket/zoo --dry-run", "vtzoo sync /mnt/zoo")


def run(ctx: typer.Context, *, remote: Remote, dry_run: DryRun = False) -> None:
    """Bring what each lacks to this zoo and one elsewhere; list conflicts."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.sharing import sync

    session.show(sync(remote, zoo=zoo, dry_run=dry_run), shared)

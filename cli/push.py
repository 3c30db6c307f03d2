"""`vtzoo push`."""

import typer

from ._session import Session
from ._shares import As, DryRun, Force, NoBackbone, Refs, Remote, shared

EXAMPLES = (
    "vtzoo push fashion/lora s3://bucket/zoo",
    "vtzoo push fashion/lora emoji/ssf ssh://host/srv/zoo --dry-run",
    "vtzoo push fashion/lora /mnt/zoo --as fashion/first",
)


def run(
    ctx: typer.Context,
    *,
    refs: Refs,
    remote: Remote,
    name: As = None,
    force: Force = False,
    no_backbone: NoBackbone = False,
    dry_run: DryRun = False,
) -> None:
    """Bring entries to a zoo elsewhere, with the backbones they stand on."""
    session = Session.of(ctx)
    zoo = session.zoo(*refs)
    from vtzoo.sharing import push

    result = push(refs, remote, zoo=zoo, name=name, force=force, backbone=not no_backbone, dry_run=dry_run)
    session.show(result, shared)

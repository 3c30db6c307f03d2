"""`vtzoo pull`."""

from typing import Annotated

import typer

from vtzoo.errors import UsageError

from ._options import PublicKey, RequireSigned
from ._session import Session
from ._shares import As, DryRun, Force, NoBackbone, Remote, shared

EXAMPLES = (
    "vtzoo pull fashion/lora s3://bucket/zoo",
    "vtzoo pull fashion/lora@sha256:ab12cd https://host/zoo --as theirs/fashion",
    "vtzoo pull --all /mnt/zoo --dry-run",
)


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Entries there: names, unique prefixes, name@sha256:….")
    ] = None,
    remote: Remote,
    every: Annotated[bool, typer.Option("--all", help="All entries there, instead of REF....")] = False,
    name: As = None,
    force: Force = False,
    no_backbone: NoBackbone = False,
    dry_run: DryRun = False,
    require_signed: RequireSigned = False,
    public_key: PublicKey = None,
) -> None:
    """Bring entries of a zoo elsewhere into this one, verified."""
    session = Session.of(ctx)
    if every == bool(refs):
        raise UsageError(
            "name entries, or --all" if not refs else "REF and --all don't go together", "vtzoo pull --help"
        )
    zoo = session.zoo()
    from vtzoo.sharing import pull

    result = pull(
        refs or (), remote, zoo=zoo, name=name, force=force, backbone=not no_backbone, dry_run=dry_run,
        require_signed=require_signed, public_key=public_key,
    )  # fmt: skip
    session.show(result, shared)

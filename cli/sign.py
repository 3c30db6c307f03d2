"""`vtzoo sign`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._blocks import Block, Line
from ._session import Session

EXAMPLES = ("vtzoo sign fashion/lora --key key.pem", "vtzoo sign fashion/lora both --key key.pem")


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Entries of this zoo.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE.pem", help="A private key on an elliptic curve.")],
) -> None:
    """Sign entries with a key of your own.

    Their files and facts, as they are: see verify --public-key.
    """
    session = Session.of(ctx)
    zoo = session.zoo(*refs)
    from vtzoo.verbs.sign import sign

    made = sign(*refs, key=key, zoo=zoo)
    session.show({"ref": ", ".join(r.ref for r in made), "signatures": {r.ref: r.path for r in made}}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"signed {facts['ref']}")]

"""`vtzoo card`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtzoo.errors import Conflict
from vtzoo.files import atomic_text

from ._blocks import Block, Line
from ._options import Ref
from ._origin import origin_of
from ._session import Session

if TYPE_CHECKING:
    from vtzoo.lineage import Origin
    from vtzoo.zoo import Zoo

EXAMPLES = ("vtzoo card fashion/lora", "vtzoo card fashion/lora --out README.md")


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.md", help="Write it to a new file instead of printing it.")
    ] = None,
) -> None:
    """Write a model card: method, data, metrics, lineage, use, licence."""
    session = Session.of(ctx)
    zoo = session.zoo()
    if out is not None and out.exists():
        raise Conflict(f"{out} exists already", "choose another file name, or remove it")
    from vtzoo.model_card import card

    found = origin_of(zoo, ref)
    text = card(zoo, found)
    if out is not None:
        atomic_text(out, _with_front(zoo, found, text))
    session.show({"ref": found.name, "path": str(out or ""), "card": text}, _view)


def _with_front(zoo: "Zoo", found: "Origin", text: str) -> str:
    """With what a hub reads first, of an entry; it takes the hub's library, so what is only printed goes without."""
    if found.entry is None:
        return text
    from vtzoo.hub_card import front_matter, with_front

    return with_front(front_matter([found.entry], zoo.entries()), text)


def _view(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"wrote {facts['path']}" if facts["path"] else facts["card"].rstrip())]

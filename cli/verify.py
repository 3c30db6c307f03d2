"""`vtzoo verify`."""

from typing import Annotated, Any

import typer

from vtzoo.errors import Corrupt

from ._blocks import Block, Line, Table, size
from ._options import PublicKey, RequireSigned
from ._session import Session

EXAMPLES = ("vtzoo verify", "vtzoo verify fashion/lora both", "vtzoo verify --require-signed --public-key team.pub")


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[list[str] | None, typer.Argument(metavar="[REF...]", help="Entries (default: all).")] = None,
    require_signed: RequireSigned = False,
    public_key: PublicKey = None,
) -> None:
    """Read every file and say what is wrong.

    Digests, sizes, headers, numbers, places, modes, and signatures where a key is given.
    """
    session = Session.of(ctx)
    zoo = session.zoo(*(refs or ()))
    from vtzoo.verbs.verify import verify

    found = verify(*(refs or ()), require_signed=require_signed, public_key=public_key, zoo=zoo)
    session.show(found, _view)
    if bad := [r["name"] for r in found.rows if r["wrong"]]:
        said = f"{len(bad)} of {len(found.rows)} entries can't be trusted, the first is '{bad[0]}'"
        raise Corrupt(
            said, f"fetch or make them again, sign what you vouch for (vtzoo sign), or take it away: vtzoo rm {bad[0]}"
        )


def _view(facts: dict[str, Any]) -> list[Block]:
    told = facts["report"]
    rows = [(r["name"], r["section"], w) for r in facts["rows"] for w in r["wrong"]]
    blocks: list[Block] = [Table(("entry", "section", "what is wrong"), rows)] if rows else []
    elsewhere = sum(not r["here"] for r in facts["rows"])
    words = f"{told['entries']} entries, {told['objects']} files, {size(told['size_bytes'])} read in {told['seconds']:.1f} s"
    words += f"; {elsewhere} have nothing here" if elsewhere else ""
    words += f"; {told['signed']} signed" if told["signed"] else ""
    return [*blocks, Line(f"{words}; {told['wrong']} wrong" if rows else f"{words}: all sound")]

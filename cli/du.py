"""`vtzoo du`."""

from typing import Any, get_args

import typer

from ._blocks import Block, Line, Table, size
from ._session import Session

EXAMPLES = ("vtzoo du", "vtzoo du --json")


def run(ctx: typer.Context) -> None:
    """Tell what takes the room: each entry, and what no entry keeps."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.leftovers import Kind, leftovers, shares

    rest = leftovers(zoo, get_args(Kind))
    entries = [
        {"name": s.entry.name, "section": s.entry.section, "size_bytes": s.size_bytes, "alone_bytes": s.alone_bytes}
        for s in shares(zoo)
    ]
    others = {kind: sum(f.size_bytes for f in rest if f.kind == kind) for kind in get_args(Kind)}
    session.show({"zoo": str(zoo.root), "entries": entries, "others": others}, _view)


def _view(facts: dict[str, Any]) -> list[Block]:
    rows = [(e["name"], e["section"], size(e["size_bytes"]), size(e["alone_bytes"])) for e in facts["entries"]]
    said = {
        "loose": "objects of no entry (vtzoo gc)", "halves": "half-written files (vtzoo gc)",
        "answers": "teachers' answers and features (vtzoo gc --answers)", "runs": "checkpoints and logs (vtzoo gc --runs)",
    }  # fmt: skip
    others = [(said[kind], size(count)) for kind, count in facts["others"].items() if count]
    blocks: list[Block] = (
        [Table(("entry", "section", "size", "free without it"), rows, right=frozenset({"size", "free without it"}))]
        if rows
        else []
    )
    blocks += [Line(""), Table(("besides", "size"), others, right=frozenset({"size"}))] if others else []
    return blocks or [Line("nothing here yet")]

"""Options of push, pull and sync, and how their result looks."""

from typing import Annotated, Any

import typer

from ._blocks import Block, Line, Table, size

Remote = Annotated[
    str,
    typer.Argument(
        metavar="REMOTE", help="A folder, ssh://host/dir, s3://bucket/prefix, gs://…, https://… or hf://org/name."
    ),
]
Refs = Annotated[list[str], typer.Argument(metavar="REF...", help="Entries: names, unique prefixes, name@sha256:….")]
As = Annotated[str | None, typer.Option("--as", metavar="NAME", help="What to call it there (of one REF).")]
Force = Annotated[bool, typer.Option("--force", help="Replace what has the name already.")]
NoBackbone = Annotated[bool, typer.Option("--no-backbone", help="Leave out the backbone that a delta stands on.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would move, and how many bytes.")]
_WORDS = {"push": "sent", "pull": "fetched", "none": "up to date", "conflict": "conflict: left as it is"}
_WOULD = {**_WORDS, "push": "to send", "pull": "to fetch"}


def shared(facts: dict[str, Any]) -> list[Block]:
    """One row an entry, then the bytes that went over the wire."""
    words = _WOULD if facts["dry_run"] else _WORDS
    rows = [(e["ref"], e["section"], words[e["action"]], size(e["size_bytes"])) for e in facts["entries"]]
    total = sum(e["size_bytes"] for e in facts["entries"])
    done = (
        f"{size(facts['moved_bytes'])} moved in {facts['seconds']:.1f} s"
        if not facts["dry_run"]
        else f"{size(total)} would move"
    )
    table = [Table(("entry", "section", "what", "size"), rows, right=frozenset({"size"}))] if rows else []
    return [*table, Line(f"{facts['remote']}: {done}")]

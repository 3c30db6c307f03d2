"""`vtzoo gc`."""

import re
from typing import Annotated, Any

import typer

from vtzoo.errors import UsageError

from ._blocks import Block, Line, Table, size
from ._session import Session

EXAMPLES = ("vtzoo gc --dry-run", "vtzoo gc --grace 1h", "vtzoo gc --answers --runs")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def run(
    ctx: typer.Context,
    *,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="Leave what was written within this time: 30m, 1h, 2d.")
    ] = "1d",
    answers: Annotated[
        bool, typer.Option("--answers", help="Also teachers' answers and features, made again when wanted.")
    ] = False,
    runs: Annotated[bool, typer.Option("--runs", help="Also checkpoints and logs of training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Sweep up what no entry keeps, if nobody wrote it lately."""
    session = Session.of(ctx)
    grace_s, zoo = seconds(grace), session.zoo()
    from vtzoo.leftovers import SWEPT, Kind, collect

    more: dict[Kind, bool] = {"answers": answers, "runs": runs}
    gone = collect(zoo, [*SWEPT, *(kind for kind, asked in more.items() if asked)], grace_s=grace_s, dry_run=dry_run)
    listed = [
        {"kind": f.kind, "path": str(f.path.relative_to(zoo.root)), "size_bytes": f.size_bytes, "age_s": round(f.age_s)}
        for f in gone
    ]
    session.show({"removed": listed, "dry_run": dry_run, "size_bytes": sum(f.size_bytes for f in gone)}, _view)


def seconds(text: str) -> float:
    """A time that a person typed.

    Raises:
        UsageError: no number with one of the units.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise UsageError(f"'{text}' is no time", "write a number and s, m, h or d, as in --grace 1h")
    return float(found[1]) * _UNITS[found[2]]


def _view(facts: dict[str, Any]) -> list[Block]:
    rows = [(f["kind"], f["path"], size(f["size_bytes"])) for f in facts["removed"]]
    verb = "would free" if facts["dry_run"] else "freed"
    total = Line(f"{verb} {size(facts['size_bytes'])} in {len(rows)} places")
    return (
        [Table(("kind", "path", "size"), rows, right=frozenset({"size"})), total]
        if rows
        else [Line("nothing to sweep up")]
    )

"""`vtzoo report`."""

from pathlib import Path
from typing import Annotated

import typer

from . import _results
from ._session import Session

EXAMPLES = (
    "vtzoo report --out all.html",
    "vtzoo report 'fashion/*' 'emoji/*' --out two-tasks.html",
    "vtzoo report ./results.jsonl --out results.html --title 'Eight tasks'",
)


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REF...]", help="Deltas, patterns such as 'fashion/*', or tables (default: all deltas)."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page; its numbers go beside it as JSON.")
    ],
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="Of the page (default: its file's name).")] = "",
) -> None:
    """Compare what was trained: a page of tables and plots."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.verbs.report import report

    session.show(report(refs=refs or [], out=out, title=title, zoo=zoo), _results.reported)

"""`vtzoo sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from . import _results
from ._options import Track, text
from ._session import Session

EXAMPLES = (
    "vtzoo sweep sweep.yaml --dry-run",
    "vtzoo sweep sweep.yaml --jobs 2 --table results.parquet",
    "vtzoo sweep sweep.yaml --engine ray",
)


def run(
    ctx: typer.Context,
    *,
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="Tasks, backbones, methods, knobs and seeds.")],
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="Processes of this machine, or a Ray cluster.")
    ] = "local",
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=0, help="Runs at once here (default: by GPUs, else processors).")
    ] = 0,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, help="Tries more for a run whose process died.")
    ] = 2,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="A copy of the table: .jsonl or .parquet.")
    ] = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and list the runs, train none.")] = False,
) -> None:
    """Train many deltas from one file, each once."""
    session = Session.of(ctx)
    from vtzoo.sweep_file import read

    asked = read(text(spec), str(spec))
    zoo = session.zoo()
    from vtzoo.verbs.sweep import sweep

    result = sweep(
        spec=asked, zoo=zoo, engine=engine, jobs=jobs, retries=retries, table=table, dry_run=dry_run, track=track or ()
    )
    session.show(result, _results.swept)

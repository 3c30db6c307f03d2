"""`vtzoo merge`."""

from typing import Annotated

import typer

from . import _results
from ._options import Name, check_spec, numbers
from ._session import Session

EXAMPLES = (
    "vtzoo merge fashion/lora emoji/ssf --method 'ties[density=0.2]' --name both",
    "vtzoo merge fashion/lora emoji/ssf --method regmean --data vtzoo:fashion --data vtzoo:emoji --name both",
)


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[list[str], typer.Argument(metavar="REF REF...", help="Deltas of one backbone.")],
    method: Annotated[str, typer.Option("--method", metavar="SPEC", help="The algorithm (see vtzoo merges).")],
    name: Name,
    coef: Annotated[
        str | None, typer.Option("--coef", metavar="1,0.5,…", help="One weight per ref, in order (default: all 1).")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="GLOB:X,…", help="Weights by tensor name, as blocks.0-5:0.3.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="Images of each ref's task, in order, for merges that need them."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Compare the deltas by pair, too; reads them once more.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan, merge nothing.")
    ] = False,
) -> None:
    """Merge several deltas into one that keeps every head."""
    session = Session.of(ctx)
    weights = numbers(coef, "--coef")
    check_spec("merges", method)
    zoo = session.zoo(*refs)
    from vtzoo.verbs.merge import merge_refs

    result = merge_refs(
        refs=refs,
        method=method,
        name=name,
        coef=weights,
        layers=layers,
        data=data or (),
        zoo=zoo,
        explain=explain,
        dry_run=dry_run,
    )
    session.show(result, _results.merged)

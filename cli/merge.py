"""`vtzoo merge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vtzoo.errors import UsageError

from . import _results
from ._options import check_spec, numbers, text
from ._session import Session

EXAMPLES = (
    "vtzoo merge fashion/lora emoji/ssf --method 'ties[density=0.2]' --name both",
    "vtzoo merge --config merge.yaml --name both",
    "vtzoo merge fashion/lora emoji/ssf --method regmean --data vtzoo:fashion --data vtzoo:emoji --name both",
)


def run(
    ctx: typer.Context,
    *,
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF REF...", help="Deltas of one backbone.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="SPEC", help="The algorithm (see vtzoo merges).")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call the result in the zoo.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE.yaml", help="All of it in a file, also mergekit's; options win."),
    ] = None,
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
    given = {"method": method, "coef": numbers(coef, "--coef"), "layers": layers, "data": data, "name": name}
    asked = _asked(refs, config, {k: v for k, v in given.items() if v is not None})
    check_spec("merges", asked["method"])
    zoo = session.zoo(*asked["refs"])
    from vtzoo.verbs.merge import merge_refs

    session.show(merge_refs(**asked, zoo=zoo, explain=explain, dry_run=dry_run), _results.merged)


def _asked(refs: list[str] | None, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """What the file says, and over it what stands on the command line.

    Raises:
        NotFound: no such file.
        UsageError: deltas in both or in neither, or no method or name in either.
    """
    asked: dict[str, Any] = {"refs": refs or [], "coef": None, "layers": None, "data": ()}
    if config is not None:
        from dataclasses import asdict

        from vtzoo.merge_file import read

        found = {k: v for k, v in asdict(read(text(config), str(config))).items() if v}
        if refs and "refs" in found:
            raise UsageError(f"{config} names deltas, and so does the command line", "leave them out of one")
        asked |= found
    asked |= given
    for what, how in (
        ("refs", "name deltas: vtzoo merge REF REF …"),
        ("method", "--method ties"),
        ("name", "--name both"),
    ):
        if not asked.get(what):
            raise UsageError(f"no {'deltas' if what == 'refs' else what} given", f"{how}, or a file with --config")
    return asked

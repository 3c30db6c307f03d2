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
    "vtzoo merge both --without emoji --name rest",
)


Refs = Annotated[list[str] | None, typer.Argument(metavar="REF REF...", help="Deltas of one backbone.")]
Method = Annotated[str | None, typer.Option("--method", metavar="SPEC", help="The algorithm (see vtzoo merges).")]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call the result in the zoo.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE.yaml", help="All of it in a file, also mergekit's; options win."),
]
Coef = Annotated[
    str | None, typer.Option("--coef", metavar="1,0.5,…", help="One weight per ref, in order (default: all 1).")
]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="GLOB:X,…", help="Weights by tensor name, as blocks.0-5:0.3.")
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="DATA", help="Images of each ref's task, in order, for what looks at images."),
]
Search = Annotated[
    str | None,
    typer.Option("--search", metavar="scale|layers|coef", help="Find these coefficients on the images of --data."),
]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="agreement|entropy|accuracy", help="What a search compares (default: agreement)."),
]
RefitHeads = Annotated[
    str | None,
    typer.Option("--refit-heads", metavar="expert|labels", help="Fit the heads to the merged features, on --data."),
]
Keep = Annotated[str | None, typer.Option("--keep", metavar="lora[rank=N]", help="Keep merged matrices as a LoRA.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="A page on it, and JSON; with --data what each task is worth."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="TASK", help="Take a task out of a merge, the one REF."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Compare the deltas by pair, too; reads them once more.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, merge nothing.")]


def run(
    ctx: typer.Context, *, refs: Refs = None, method: Method = None, name: Name = None, config: Config = None, coef: Coef = None,
    layers: Layers = None, data: Data = None, search: Search = None, by: By = None, refit_heads: RefitHeads = None, keep: Keep = None,
    report: Report = None, without: Without = None, explain: Explain = False, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Merge several deltas into one that keeps every head."""
    session = Session.of(ctx)
    given = {
        "method": method, "coef": numbers(coef, "--coef"), "layers": layers, "data": data, "name": name, "search": search, "by": by,
        "refit_heads": refit_heads, "keep": keep, "report": report,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    if without:
        session.show(_without(session, refs or [], without, config, given), _results.merged)
        return
    asked = _asked(refs, config, given)
    if asked.get("by") and not asked.get("search"):
        raise UsageError("--by says what a search compares, and there is none", "--search scale, or leave --by out")
    check_spec("merges", asked["method"])
    zoo = session.zoo(*asked["refs"])
    from vtzoo.verbs.merge import merge_refs

    made = merge_refs(**asked, zoo=zoo, explain=explain, dry_run=dry_run, awaited=session.awaited)
    session.show(made, _results.merged)


def _without(session: Session, refs: list[str], tasks: list[str], config: Path | None, given: dict[str, Any]) -> Any:
    """Take tasks out of a merge.

    Raises:
        UsageError: not one merge, no name, or an option that the merge's own lineage decides.
    """
    spare = [k for k in given if k not in ("name", "data")] + (["config"] if config else [])
    if spare:
        raise UsageError(f"--{spare[0].replace('_', '-')} is decided by the merge that a task leaves", "leave it out")
    if len(refs) != 1 or "name" not in given:
        raise UsageError(
            "--without wants one merge and a name for the rest", "vtzoo merge MERGE --without TASK --name NAME"
        )
    zoo = session.zoo(*refs)
    from vtzoo.verbs.merge import unmerge

    return unmerge(ref=refs[0], tasks=tasks, name=given["name"], data=given.get("data", ()), zoo=zoo)


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

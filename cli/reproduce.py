"""`vtzoo reproduce`."""

from typing import Annotated, Any

import typer

from vtzoo.errors import Mismatch

from . import _results
from ._blocks import Block, Line, Table
from ._options import Ref
from ._session import Session

EXAMPLES = (
    "vtzoo reproduce fashion/lora",
    "vtzoo reproduce photos/lora --data /mnt/photos --tolerance 0.02 --keep photos/again",
)


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="DATA", help="Where the images are now, as often as the recorded command has it."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", metavar="X", min=0, help="How far metrics may be off; without metrics, the tensors."
        ),
    ] = 0.01,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="NAME", help="Also keep the result in the zoo under this name.")
    ] = None,
) -> None:
    """Run an entry's recorded command again and compare the results."""
    session = Session.of(ctx)
    zoo = session.zoo()
    entry = zoo.resolve(ref)
    from vtzoo.again import MANY, trained_line
    from vtzoo.lineage import of_entry

    from . import _again

    command = str(entry.facts.get("command") or "")
    line = _again.read(trained_line(of_entry(zoo, entry), data or ()) if _again.verb_of(command) in MANY else command)
    from vtzoo.verbs.reproduce import reproduce

    found = reproduce(ref=ref, line=line, run=_again.run, data=data or (), tolerance=tolerance, keep=keep, zoo=zoo)
    session.show(found, _view)
    if not found.within:
        raise Mismatch(
            f"what came out is not '{entry.name}': it is further from it than {tolerance:g}",
            "the versions above may be why; --tolerance X allows more",
        )


def _view(facts: dict[str, Any]) -> list[Block]:
    """What differs, then the verdict."""
    found = facts["report"]
    rows = [(v["what"], v["recorded"], v["now"]) for v in found["versions"]]
    blocks: list[Block] = [Table(("made with", "recorded", "now"), rows)] if rows else []
    if found["same_digest"]:
        return [*blocks, Line(f"the very same file: sha256:{found['digest'][:12]}…"), *_kept(facts)]
    if found["metrics"]:
        shown = [(m["metric"], *(f"{m[k]:.4f}" for k in ("recorded", "again", "difference"))) for m in found["metrics"]]
        blocks.append(Table(("metric", "recorded", "again", "difference"), shown, right=frozenset(("recorded", "again", "difference"))))  # fmt: skip
    blocks += _results.report({k: found[k] for k in ("by", "because", "tensors", "outputs") if found.get(k)})
    verdict = (
        "the same tensors" if found["same_tensors"] else "within the tolerance" if facts["within"] else "too far off"
    )
    return [*blocks, Line(f"another file, {verdict} (tolerance {found['tolerance']:g})"), *_kept(facts)]


def _kept(facts: dict[str, Any]) -> list[Block]:
    return [Line(f"kept as {facts['ref']}")] if facts["ref"] else []

"""`vtzoo diff`."""

from typing import Annotated, Any

import typer

from ._blocks import Block, Line, Table
from ._options import Ref
from ._session import Session

EXAMPLES = ("vtzoo diff fashion/lora fashion/ssf", "vtzoo diff fashion/lora ./other.safetensors --all")
SHOWN = 20
_NUMBERS = ("norm a", "norm b", "cosine", "difference", "distance", "largest")


def run(
    ctx: typer.Context,
    *,
    a: Ref,
    b: Annotated[str, typer.Argument(metavar="REF", help="The other one.")],
    every: Annotated[bool, typer.Option("--all", help="All tensors, and the facts that are the same, too.")] = False,
) -> None:
    """Compare two deltas or models: facts, and tensors by norm and cosine."""
    session = Session.of(ctx)
    zoo = session.zoo(a, b)
    from vtzoo.verbs.diff import diff

    session.show(diff(a=a, b=b, zoo=zoo), lambda facts: _view(facts, every=every))


def _view(found: dict[str, Any], *, every: bool) -> list[Block]:
    """Facts that differ, then tensors, the largest difference first."""
    facts = [f for f in found["facts"] if every or not f["same"]]
    rows = [(f["what"], _text(f["a"]), _text(f["b"])) for f in facts]
    blocks: list[Block] = [Table(("fact", found["a"], found["b"]), rows)] if rows else [Line("they say the same of themselves")]  # fmt: skip
    if found["same"]:
        return [*blocks, Line("they are one file")]
    return [*blocks, Line(""), *_tensors(found["tensors"], every=every)]


def _tensors(found: dict[str, Any], *, every: bool) -> list[Block]:
    if not found["by"]:
        return [Line(f"tensors are not compared: {found['because']}")]
    why = f" ({found['because']})" if found["because"] else ""
    whole, rows = found["whole"], found["rows"]
    shown = rows if every else [r for r in rows if r["largest"]][:SHOWN]
    table = Table(
        ("tensor", *_NUMBERS), [_cells("all together", whole), *(_cells(r["tensor"], r) for r in shown)], right=frozenset(_NUMBERS)
    )  # fmt: skip
    said = f"{whole['tensors']} tensors compared by {found['by']}{why}: {whole['same']} the same"
    left = len(rows) - whole["same"] - len(shown)
    said += f", {left} more differ (--all)" if left > 0 else ""
    alone = [f"only in {side}: {', '.join(found[key][:3])}{' …' * (len(found[key]) > 3)}" for side, key in (("the first", "only_a"), ("the second", "only_b")) if found[key]]  # fmt: skip
    return [table, Line(said), *map(Line, alone)]


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    values = (row[n.replace(" ", "_")] for n in _NUMBERS)
    return name, *("" if v is None else f"{v:.4g}" for v in values)


def _text(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:4]))
        return f"{shown}, … ({len(value)})" if len(value) > 4 else shown
    if isinstance(value, str) and len(value) > 40:
        return f"{value[:24]}…"
    return "" if value is None else str(value)

"""What methods, merges, losses and inits say about themselves, as JSON facts, a table, and a page."""

import ast
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtzoo.registry import Card, Kind

    from ._session import Session

from ._blocks import Block, Line, Table


def answer(session: "Session", kind: "Kind", name: str | None) -> None:
    """List all of a kind, or show one's page."""
    from vtzoo import registry

    if name is None:
        session.show([facts(c, kind) for c in registry.cards(kind)], table)
    else:
        session.show(facts(registry.card(kind, name), kind), page)


def facts(card: "Card", kind: "Kind") -> dict[str, Any]:
    """One card as plain facts, the form `--json` prints."""
    common = {
        "name": card.name,
        "summary": card.summary,
        "paper": card.paper,
        "knobs": [{"name": k.name, "type": readable(k.type), "default": k.default} for k in card.knobs],
        "doc": card.doc,
    }
    if kind == "merges":
        own = card.constants
        return {
            **common,
            "stage": own.get("STAGE", "merge"),
            "symmetric": own["SYMMETRIC"],
            "needs": own.get("NEEDS", "nothing"),
            "low_rank": own["LOW_RANK"],
        }
    if kind != "methods":
        return common
    return {**common, "group": card.group, "folds": card.verdict, "families": families().get(card.name, [])}


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}


def readable(annotation: str) -> str:
    """A type as people say it: `Annotated[int, Field(ge=1)] | None` is "int ≥ 1 or None"."""
    return _said(ast.parse(annotation, mode="eval").body) if annotation else ""


def _said(node: ast.expr) -> str:
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return f"{_said(left)} or {_said(right)}"
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([kind, *extras])):
            limits = [w for e in extras if isinstance(e, ast.Call) for k in e.keywords if (w := _limit(k))]
            return f"{_said(kind)} {' and '.join(limits)}".rstrip()
        case ast.Subscript(ast.Name("Literal"), inside):
            choices = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            return " or ".join(str(ast.literal_eval(c)) for c in choices)
        case ast.Subscript(ast.Name("tuple"), ast.Tuple([kind, *_])):
            return f"list of {_said(kind)}"
        case _:
            return ast.unparse(node)


def _limit(keyword: ast.keyword) -> str:
    sign = SIGNS.get(keyword.arg or "")
    return f"{sign} {ast.unparse(keyword.value)}" if sign else ""


@cache
def families() -> dict[str, list[str]]:
    """Which backbone families each method was measured to work on; empty where that table is missing."""
    import yaml

    source = files("vtzoo.methods").joinpath("_support.yaml")
    if not source.is_file():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    support = yaml.load(source.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both loaders are safe
    return {name: [f for f, found in cells.items() if found in ("folds", "live")] for name, cells in support.items()}


def table(found: list[dict[str, Any]]) -> list[Block]:
    """All of a kind, one a row."""
    if found and "stage" in found[0]:
        rows = [
            (
                c["name"],
                c["stage"],
                c["needs"],
                *("yes" if c[k] else "no" for k in ("low_rank", "symmetric")),
                c["paper"],
                what(c),
            )
            for c in found
        ]
        return [Table(("name", "stage", "needs", "stays low-rank", "symmetric", "paper", "what it is"), rows)]
    if not found or "group" not in found[0]:
        return [Table(("name", "paper", "what it is"), [(c["name"], c["paper"], what(c)) for c in found])]
    rows = [(c["name"], c["group"], c["folds"], c["paper"], what(c)) for c in found]
    return [Table(("name", "group", "folds", "paper", "what it is"), rows)]


def page(card: dict[str, Any]) -> list[Block]:
    """One's whole documentation and its knobs."""
    blocks: list[Block] = [Line(card["doc"]), Line("")]
    blocks += [Line(f"{key}: {card[key]}") for key in ("group", "stage", "needs", "paper", "folds") if card.get(key)]
    if card.get("families"):
        blocks.append(Line(f"tested on: {', '.join(card['families'])}"))
    rows = [(k["name"], k["default"] or "(required)", k["type"]) for k in card["knobs"]]
    return [*blocks, Line(""), Table(("knob", "default", "type"), rows)] if rows else [*blocks, Line("knobs: none")]


def what(card: dict[str, Any]) -> str:
    """The summary without the name it starts with and the citation it ends with."""
    _, colon, rest = str(card["summary"]).partition(": ")
    return (rest if colon else card["summary"]).partition(" (")[0].rstrip(".")

"""Entries of a zoo, as JSON facts, tables and a page."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ._blocks import Block, Line, Table, number, size

if TYPE_CHECKING:
    from vtzoo.zoo import Entry, Zoo

SECTIONS = ("backbones", "deltas", "models")
_RIGHT = frozenset({"size", "params", "input", "top-1"})


def listed(entry: "Entry") -> dict[str, Any]:
    """One entry as plain facts, the form `ls --json` prints."""
    return {"name": entry.name, "section": entry.section, **entry.facts}


def described(zoo: "Zoo", ref: str) -> dict[str, Any]:
    """One entry with what its own file says (a delta's header)."""
    entry = zoo.resolve(ref)
    found = listed(entry)
    digest = entry.facts.get("digest")
    if entry.section == "deltas" and digest:
        from vtzoo.files import header

        path = zoo.object(digest)
        head = header(path)
        found["path"] = str(path)
        found["header"] = json.loads(head.metadata.get("vtzoo", "{}"))
        found["tensors"] = {name: {"dtype": s.dtype, "shape": list(s.shape)} for name, s in head.tensors.items()}
    return found


def tables(found: list[dict[str, Any]]) -> list[Block]:
    """One table for each section that has entries, the user's own work first."""
    views = {"deltas": _deltas, "models": _models, "backbones": _backbones}
    blocks: list[Block] = []
    for section, view in views.items():
        mine = [f for f in found if f["section"] == section]
        if mine:
            blocks += [Line(""), view(mine)] if blocks else [view(mine)]
    return blocks or [Line("nothing here yet: vtzoo train --help, or vtzoo demo")]


def page(facts: dict[str, Any]) -> list[Block]:
    """All facts of one entry, one a line; tensors only counted."""
    rows = [(key, _words(value)) for key, value in _flat(facts) if _words(value)]
    return [Table(("fact", "value"), rows)]


def top1(metrics: Mapping[str, Any] | None) -> str:
    """The accuracy worth a column: of the test split, else validation, else the mean over tasks."""
    found = _accuracies(metrics or {})
    return f"{sum(found) / len(found):.1%}" if found else ""


def _accuracies(metrics: Mapping[str, Any]) -> list[float]:
    if isinstance(metrics.get("top1"), int | float):
        return [float(metrics["top1"])]
    for split in ("test", "val"):
        if isinstance(metrics.get(split), Mapping):
            return _accuracies(metrics[split])
    return [x for value in metrics.values() if isinstance(value, Mapping) for x in _accuracies(value)]


def _backbones(found: list[dict[str, Any]]) -> Table:
    rows = [
        (
            f["name"],
            number(f.get("params")),
            "x".join(str(n) for n in (f.get("input_size") or ())[1:]),
            str(f.get("license", "")),
            str(f.get("good_for", "")),
        )
        for f in found
    ]
    return Table(("backbone", "params", "input", "licence", "good for"), rows, right=_RIGHT)


def _deltas(found: list[dict[str, Any]]) -> Table:
    rows = [
        (
            f["name"],
            str(f.get("method", "")),
            str(f.get("backbone", "")),
            _tasks(f),
            size(f.get("size_bytes")),
            top1(f.get("metrics")),
        )
        for f in found
    ]
    return Table(("delta", "method", "backbone", "tasks", "size", "top-1"), rows, right=_RIGHT)


def _models(found: list[dict[str, Any]]) -> Table:
    rows = [
        (
            f["name"],
            str(f.get("kind", "")),
            str(f.get("arch", "")),
            _tasks(f),
            size(f.get("size_bytes")),
            top1(f.get("metrics")),
        )
        for f in found
    ]
    return Table(("model", "kind", "arch", "tasks", "size", "top-1"), rows, right=_RIGHT)


def _tasks(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(t["name"]) if isinstance(t, Mapping) else str(t) for t in facts.get("tasks") or ())


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts under dotted keys; the tensor list becomes its length."""
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if not prefix and key == "tensors":
            rows.append((key, len(value)))
        elif isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            rows += [row for i, v in enumerate(value) for row in _flat(v, f"{prefix}{key}[{i}].")]
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = ", ".join(str(v) for v in value[:12])
        return f"{shown}, … ({len(value)})" if len(value) > 12 else shown
    return "" if value is None else str(value)

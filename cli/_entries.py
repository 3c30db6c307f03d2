"""Entries of a zoo, as JSON facts, tables and a page."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtzoo import strict
from vtzoo.documents import document
from vtzoo.errors import Corrupt, VtzooError
from vtzoo.files import header
from vtzoo.refs import Entry, as_path, is_path, resolve

from ._blocks import Block, Line, Table, number, size

if TYPE_CHECKING:
    from ._session import Session

_LONG = ("header.config.", "header.backbone.")
_RIGHT = frozenset({"size", "params", "input", "top-1"})


def listed(entry: Entry) -> dict[str, Any]:
    """One entry as plain facts, the form `ls --json` prints."""
    return {"name": entry.name, "section": entry.section, **entry.facts}


def described(session: "Session", ref: str) -> dict[str, Any]:
    """One entry, or a file outside any zoo, with what its own header says."""
    if is_path(ref):
        path = as_path(ref)
        return _licensed({"name": path.name, "size_bytes": path.stat().st_size, **_inside(path)})
    zoo = session.zoo()
    entry = zoo.resolve(ref)
    found = listed(entry)
    digest: str = entry.facts.get("digest", "")
    held = bool(digest) and (entry.section == "deltas" or entry.facts.get("source", "").startswith("object:"))
    if held:
        return _licensed({**found, **_inside(zoo.object(digest))})
    config = (found.get("files") or {}).get("config.json")
    if found.get("license") or not config:
        return found
    with suppress(VtzooError):  # verify tells of what is missing or damaged
        told = document(zoo.object(config)).get("pretrained_cfg")
        return {**found, "license": told.get("license")} if isinstance(told, dict) else found
    return found


def elsewhere(url: str) -> list[Entry]:
    """The entries of a zoo elsewhere."""
    from vtzoo.moves import entries_of
    from vtzoo.patience import patiently
    from vtzoo.remotes import open_remote

    return entries_of(patiently(open_remote(url).index)[0])


def described_elsewhere(ref: str, url: str) -> dict[str, Any]:
    """One entry of a zoo elsewhere, as its index has it."""
    return listed(resolve(ref, elsewhere(url)))


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
    """The facts of one entry, one a line; tensors only counted, sites left to `--json`."""
    rows = [(key, _words(value)) for key, value in _flat(facts) if _words(value) and not key.startswith(_LONG)]
    return [Table(("fact", "value"), rows)]


def top1(metrics: Mapping[str, Any] | None) -> str:
    """The accuracy worth a column: of the test split, else validation, else the mean over tasks."""
    found = _accuracies(metrics or {})
    return f"{sum(found) / len(found):.1%}" if found else ""


def _licensed(found: dict[str, Any]) -> dict[str, Any]:
    """With the licence of the backbone, which older indexes leave to the file."""
    told = found["header"].get("backbone")
    license_ = told.get("license") if isinstance(told, dict) else None
    return {"license": license_, **{k: v for k, v in found.items() if v or k != "license"}} if license_ else found


def _inside(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself: its facts when it is a delta, and its tensors."""
    head = header(path)
    try:
        facts = strict.record(head.metadata.get("vtzoo", "{}"))
    except ValueError as error:
        raise Corrupt(f"{path}: what its header says {error}", "fetch it or make it again") from error
    tensors = {name: {"dtype": span.dtype, "shape": list(span.shape)} for name, span in head.tensors.items()}
    return {"path": str(path), "header": facts, "tensors": tensors}


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
            str(f.get("license") or ""),
        )
        for f in found
    ]
    return Table(("delta", "method", "backbone", "tasks", "size", "top-1", "licence"), rows, right=_RIGHT)


def _models(found: list[dict[str, Any]]) -> Table:
    rows = [
        (
            f["name"],
            str(f.get("kind", "")),
            str(f.get("arch", "")),
            _tasks(f),
            size(f.get("size_bytes")),
            top1(f.get("metrics")),
            str(f.get("license") or ""),
        )
        for f in found
    ]
    return Table(("model", "kind", "arch", "tasks", "size", "top-1", "licence"), rows, right=_RIGHT)


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

"""How each verb's result looks to a person."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ._blocks import Block, Line, Table, number, size

_NONE = ({"class": "none"},)
_SHARES = frozenset({"teacher", "no_teacher", "retention", "agreement"})
_SHOWN = ("top1", "top5", "balanced_accuracy", "map", "micro_f1", "macro_f1", "loss", "ece")


def trained(facts: dict[str, Any]) -> list[Block]:
    """Metrics by split, then what was made; of a dry run what it would take."""
    made = f"{facts['ref']}: {number(facts['params'])} trainable parameters"
    return [
        *_planned(facts.get("plan"), facts.get("recipe", {})),
        *_metrics("split", facts["metrics"]),
        Line(made),
        *_where(facts),
    ]


def _planned(plan: dict[str, Any] | None, recipe: dict[str, Any]) -> list[Block]:
    if not plan:
        return []
    knobs = f"{recipe['epochs']} epochs of batches of {recipe['batch_size']}, lr {recipe['lr']:g}"
    rows = [
        ("recipe", f"{recipe['preset']}: {knobs}, weight decay {recipe['weight_decay']:g}"),
        ("images", f"{plan['images']:,}"),
        ("steps", f"{plan['steps']:,}"),
        ("estimated time", _time(plan["seconds"])),
        *([("peak memory", size(plan["peak_bytes"]))] if plan["peak_bytes"] else []),
    ]
    if kept := plan["features"]:
        rows.append(
            ("runs once", f"all before {kept['cut']}, for {kept['views']} views; {size(kept['size_bytes'])} of disk")
        )
    return [Table(("what", "value"), [*rows, *(("acts on", line) for line in plan["acts"])])]


def evaluated(facts: dict[str, Any]) -> list[Block]:
    """Metrics by task."""
    return _metrics("task", facts["metrics"])


def predicted(facts: dict[str, Any]) -> list[Block]:
    """The classes of each image, most probable first."""
    rows = [
        (
            str(p["image"]) if i == 0 else "",
            str(p.get("task", "")) if i == 0 else "",
            str(t["class"]),
            f"{t['probability']:.1%}" if "probability" in t else "",
        )
        for p in facts["predictions"]
        for i, t in enumerate(p["top"] or _NONE)
    ]
    return [Table(("image", "task", "class", "probability"), rows, right=frozenset({"probability"}))]


def merged(facts: dict[str, Any]) -> list[Block]:
    """The report, then what was made."""
    made = (
        f"merged into {facts['ref']}" if facts["path"] else f"nothing is merged: {facts['ref']} would be made of this"
    )
    return [*report(facts["report"]), Line(made), *_where(facts)]


def folded(facts: dict[str, Any]) -> list[Block]:
    """The largest differences, then the folder."""
    return [*report(facts["report"]), Line(f"folded into {facts['path']}")]


def distilled(facts: dict[str, Any]) -> list[Block]:
    """Metrics, then what was made; of a search what was taken."""
    found = {**facts["report"]}
    for key in ("search", "measured"):
        rows = [{k: v for k, v in row.items() if k != "chosen"} for row in found.pop(key, []) if row["chosen"]]
        found |= {key: rows} if rows else {}
    return [*_metrics("who", facts["metrics"]), *report(found), Line(f"made {facts['ref']}"), *_where(facts)]


def exported(facts: dict[str, Any]) -> list[Block]:
    """The verification, then the file."""
    return [*report(facts["report"]), Line(f"wrote {facts['path']}")]


def benched(facts: dict[str, Any]) -> list[Block]:
    """What the network is, then its times."""
    return report(facts["report"])


def added(facts: dict[str, Any]) -> list[Block]:
    """The new entry."""
    return [Line(f"added {facts['ref']}"), *_where(facts)]


def imported(facts: dict[str, Any]) -> list[Block]:
    """The new entry."""
    return [Line(f"imported as {facts['ref']}"), *_where(facts)]


def sensed(facts: dict[str, Any]) -> list[Block]:
    """What was looked at, then one row a layer."""
    found = facts["report"]
    rows = [
        (
            s["site"],
            s["kind"],
            number(s["parameters"]),
            f"{s['score']:.3g}",
            f"{s['per_parameter']:.3g}",
            f"{s['share']:.1%}",
        )
        for s in found["sites"]
    ]
    columns = ("site", "kind", "parameters", "score", "per parameter", "share")
    seen = f"{facts['ref']}, {number(found['parameters'])} parameters, on {found['images']} images of {found['classes']} classes"
    return [Table(columns, rows, right=frozenset(columns[2:])), Line(seen)]


def suggested(facts: dict[str, Any]) -> list[Block]:
    """What fits, at which knobs and what cost; then what doesn't, and why."""
    found = facts["report"]
    columns = ("method", "parameters", "share", "by default", "folds", "memory", "file")
    rows = [
        (
            f["spec"], number(f["parameters"]), f"{f['share']:.2%}", number(f["default_parameters"]), f["folds"],
            size(f["memory_bytes"]), size(f["file_bytes"]),
        )
        for f in found["fits"]
    ]  # fmt: skip
    sides = "x".join(map(str, found["input_size"][1:]))
    about = f"{facts['ref']}: {number(found['backbone_parameters'])} parameters; budget {number(found['budget'])}; a head of "
    about += f"{number(found['head_parameters'])} more; memory in float32 with {found['batch_size']} images of {sides}"
    blocks: list[Block] = [Table(columns, rows, right=frozenset(columns) - {"method", "folds"}), Line(about)]
    if found["refused"]:
        blocks += [Line(""), Table(("not", "because"), [(r["name"], r["reason"]) for r in found["refused"]])]
    return blocks


def swept(facts: dict[str, Any]) -> list[Block]:
    """How the methods stand, then the counts; of a dry run the names of what would be made."""
    found = facts["report"]
    counts = f"{facts['ref']}: {found['runs']} runs, {found['done']} done before"
    if not facts["path"]:
        return [*map(Line, found["names"]), *_left(found["plan"], counts, found["finals"])]
    counts += f", {found['made']} made now" + (f", {found['stopped']} stopped early" if found["stopped"] else "")
    return [_standings(found["standings"]), Line(counts), Line(f"table: {facts['path']}")]


def _left(plan: list[dict[str, Any]], counts: str, finals: int) -> list[Block]:
    """What a sweep has still to do, and how long that would take."""
    after = [Line(f"then {finals} finals with the best knobs")] if finals else []
    if not plan:
        return [Line(counts), *after]
    columns = ("backbone", "method", "runs", "estimated time")
    rows = [(p["backbone"], p["method"], str(p["runs"]), _time(p["seconds"])) for p in plan]
    total = _time(sum(p["seconds"] for p in plan))
    return [Table(columns, rows, right=frozenset(columns[2:])), Line(f"{counts}, {total} one after the other"), *after]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def reported(facts: dict[str, Any]) -> list[Block]:
    """How the methods stand, then the page."""
    found = facts["report"]
    return [_standings(found["standings"]), Line(f"{found['rows']} rows, in {facts['path']}")]


def demo(facts: dict[str, Any]) -> list[Block]:
    """The whole main job's table."""
    return [*report(facts["report"]), Line(f"everything is in {facts['path']}: vtzoo ls --zoo {facts['path']}")]


def _standings(found: list[dict[str, Any]]) -> Table:
    columns = ("backbone", "method", "runs", "tasks", "mean score", "± 95 %", "rank", "parameters", "seconds")
    rows = [
        (
            s["backbone"], f"{s['method']} {s['knobs']}".strip(), str(s["runs"]), str(len(s["by_task"])), f"{s['mean']:.1%}",
            "" if s["half"] is None else f"{s['half']:.1%}", "" if s["rank"] is None else f"{s['rank']:.1f}",
            number(s["params"]), "" if s["seconds"] is None else f"{s['seconds']:.1f}",
        )
        for s in found
    ]  # fmt: skip
    return Table(columns, rows, right=frozenset(columns[2:]))


def report(found: Mapping[str, Any]) -> list[Block]:
    """Any report: single values as one table, a list of records as a table of its own."""
    single = [(_label(k), _cell(k, v)) for k, v in found.items() if not _is_records(v)]
    blocks: list[Block] = [Table(("what", "value"), single)] if single else []
    return blocks + [_records(_label(k), v) for k, v in found.items() if _is_records(v)]


def _metrics(what: str, found: Mapping[str, Any]) -> list[Block]:
    """One row a task or split; flat metrics are one row."""
    nested = {k: v for k, v in found.items() if isinstance(v, Mapping)} or ({"": found} if found else {})
    columns = [c for c in _SHOWN if any(c in m for m in nested.values())]
    rows = [(str(k), *(_metric(c, m.get(c)) for c in columns)) for k, m in nested.items()]
    names = [_label(c) for c in columns]
    return [Table((what, *names), rows, right=frozenset(names))] if columns else []


def _metric(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" if name in ("loss", "ece") else f"{value:.1%}"


def _where(facts: Mapping[str, Any]) -> list[Block]:
    return [Line(f"file: {facts['path']}")] if facts.get("path") else []


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _records(title: str, rows: list[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [tuple(_cell(c, row.get(c)) for c in columns) for row in rows]
    numeric = {_label(c) for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}
    return Table(tuple(_label(c) for c in columns), cells, title=title, right=frozenset(numeric))


def _label(key: str) -> str:
    return str(key).removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: Any) -> str:
    """A value as its name wants it: bytes scaled, accuracies in percent."""
    if key.endswith("_bytes") and isinstance(value, int):
        return size(value)
    if key in _SHARES and isinstance(value, float):
        return f"{value:.1%}"
    return _metric(key, value) if key in _SHOWN else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value)
    return "" if value is None else str(value)

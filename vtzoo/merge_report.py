"""A page of what was merged, what each task is worth and how they interfere; and the same as JSON beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtzoo.page import RISING, cell, keep, rendered

Record = Mapping[str, Any]
SIGNED = ("#2166ac", "#f7f7f7", "#b2182b")
METRICS = {
    "cosine": ("Cosine", SIGNED, -1.0, 1.0),
    "conflict": ("Sign conflict", RISING, 0.0, 1.0),
    "overlap": ("Overlap of first directions", RISING, 0.0, 1.0),
}
"""Of a pair of tasks: its title, colours, and the values at the first and the last of them."""
_LEAST = 0.1


def save(page: Path, name: str, report: Record) -> None:
    """Write the page, and the JSON beside it."""
    keep(page, render(name, report), {"ref": name, **report})


def render(name: str, report: Record) -> str:
    """The page as HTML, without anything from outside.

    Args:
        name: of the merge.
        report: of the merge, with `interference` and, where images were given, `accuracy`.
    """
    tasks = [str(p["ref"]) for p in report["parents"]]
    matrices = [t for t in report["interference"] if any(k["rank"] is not None for k in t["tasks"])]
    pairs = sorted({(p["a"], p["b"]) for t in matrices for p in t["pairs"]})
    return rendered(
        "merge.html",
        name=name,
        report={"accuracy": [], **report},
        backbone=report["backbone"],
        tasks=tasks,
        worst=_worst(report),
        cards=_cards(report),
        ranks=[_mean_rank(matrices, i) for i in range(len(tasks))],
        squares=[_square(key, matrices, len(tasks)) for key in METRICS],
        maps=[*(_map(key, matrices, pairs, tasks) for key in METRICS), _norms(matrices, tasks)],
        recipe=_recipe(report),
    )


def _cards(report: Record) -> list[dict[str, str]]:
    rows, found = report.get("accuracy", []), list[tuple[str, str]]()
    if rows:
        found += [
            ("mean top-1, merged", f"{_mean(r['merged'] for r in rows):.1%}"),
            ("mean top-1, alone", f"{_mean(r['alone'] for r in rows):.1%}"),
            ("mean normalised", f"{_mean(r['normalized'] for r in rows if r['normalized'] is not None):.1%}"),
            ("worst task", _worst(report)),
        ]
    found.append(("time", f"{report['seconds']:.1f} s"))
    if report.get("peak_bytes"):
        found.append(("peak memory", f"{report['peak_bytes'] / 1e6:,.0f} MB"))
    return [{"name": n, "value": v} for n, v in found]


def _worst(report: Record) -> str:
    rows = [r for r in report.get("accuracy", []) if r["normalized"] is not None]
    return min(rows, key=lambda r: r["normalized"])["task"] if rows else ""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _mean_rank(matrices: Sequence[Record], task: int) -> str:
    own = [k["rank"] for t in matrices for k in t["tasks"] if k["task"] == task]
    return f"{_mean(own):.1f}" if own else ""


def _range(key: str, matrices: Sequence[Record]) -> tuple[str, Sequence[str], float, float]:
    """A metric's title, colours and ends; those of a signed one come nearer where all its values are small."""
    title, colours, low, high = METRICS[key]
    most = max([_LEAST, *(abs(p[key]) for t in matrices for p in t["pairs"] if p[key] is not None)])
    return (title, colours, -most, most) if low < 0 else (title, colours, low, high)


def _square(key: str, matrices: Sequence[Record], count: int) -> dict[str, Any]:
    """Means over the matrices, task by task."""
    title, colours, low, high = _range(key, matrices)
    seen: dict[tuple[int, int], list[float]] = {}
    for pair in (p for t in matrices for p in t["pairs"] if p[key] is not None):
        seen.setdefault((pair["a"], pair["b"]), []).append(pair[key])

    def square(i: int, j: int) -> dict[str, str]:
        own = seen.get((min(i, j), max(i, j)))
        return cell(_mean(own) if own else None, colours, low, high)

    return {"name": title, "rows": [[square(i, j) for j in range(count)] for i in range(count)]}


def _map(
    key: str, matrices: Sequence[Record], pairs: Sequence[tuple[int, int]], tasks: Sequence[str]
) -> dict[str, Any]:
    """Matrices from the input to the output, pair by pair."""
    title, colours, low, high = _range(key, matrices)
    columns = [f"{tasks[a]} · {tasks[b]}" for a, b in pairs]

    def value(tensor: Record) -> Callable[[int], float | None]:
        own = {(p["a"], p["b"]): p[key] for p in tensor["pairs"]}
        return lambda i: own.get(pairs[i])

    return _heat(title, columns, matrices, value, colours, low, high)


def _norms(matrices: Sequence[Record], tasks: Sequence[str]) -> dict[str, Any]:
    """How far each task moves each matrix."""
    most = max((k["norm"] for t in matrices for k in t["tasks"]), default=1.0) or 1.0

    def value(tensor: Record) -> Callable[[int], float | None]:
        own = {k["task"]: k["norm"] for k in tensor["tasks"]}
        return own.get

    return _heat("Norm of each task's change", tasks, matrices, value, RISING, 0.0, most)


def _heat(
    title: str, columns: Sequence[str], matrices: Sequence[Record], value: Callable[[Record], Callable[[int], float | None]],
    colours: Sequence[str], low: float, high: float,
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for tensor in matrices:
        get = value(tensor)
        cells = [cell(get(i), colours, low, high, f"{tensor['tensor']}, {c}: ") for i, c in enumerate(columns)]
        rows.append({"name": tensor["tensor"].removesuffix(".weight"), "cells": cells})
    return {
        "name": title,
        "columns": columns,
        "rows": rows,
        "colours": colours,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
    }


def _recipe(report: Record) -> list[tuple[str, str]]:
    found = [("method", report["spec"]), ("weights", ", ".join(f"{p['coef']:g}" for p in report["parents"]))]
    found += [(k, str(report[k])) for k in ("layers", "heads") if report.get(k)]
    if searched := report.get("searched"):
        values = ", ".join(f"{v:.3g}" for v in dict.fromkeys(searched["found"]))
        found.append(("searched", f"{searched['what']} by {searched['by']}, {searched['tries']} tried: {values}"))
    if kept := report.get("kept"):
        found.append(("kept as", f"{kept['as']}, {kept['cut_off']:.2%} of the norm cut off"))
    return [*found, ("deltas", " ".join(p["digest"] for p in report["parents"])), ("versions", report["versions"])]

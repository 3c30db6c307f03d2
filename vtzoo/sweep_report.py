"""A page of how methods compare: accuracy against what they cost, by task, with ranks and intervals; and the same as JSON."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtzoo.page import RISING, cell, keep, rendered
from vtzoo.standings import COSTS, Standing, standings
from vtzoo.vtab import PUBLISHED, means

NEEDS = ("jinja2", "matplotlib")
AXES = {
    "trained": ("numbers trained, head included", 1.0),
    "peak_bytes": ("peak memory of the process, MB", 1e6),
    "seconds": ("time of one training, s", 1.0),
}
"""Of each cost: the axis's title, and the unit that it is shown in."""
HUES = {
    "parameter": "#2463b4", "adapter": "#b4422c", "prompt": "#3d8a4a", "remapping": "#8a5bb0", "fine-tuning": "#c98a1b",
}  # fmt: skip
OTHER = "#66707f"
PROTOCOL = (
    "epochs",
    "limit",
    "image_size",
    "precision",
    "batch_size",
    "optimizer",
    "augment",
    "views",
    "warmup_epochs",
)
"""Knobs of training that a reader must know; the rest stands in the table."""


def save(page: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> list[Standing]:
    """Write the page and the JSON; give back the standings that they show."""
    found = standings(rows)
    facts = {"title": title, "protocol": protocol(rows), "standings": [asdict(s) for s in found], "rows": list(rows)}
    keep(page, render(title, rows, found), facts)
    return found


def protocol(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What all or some rows were trained with: each knob's values by backbone, where they differ."""
    values: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for name in PROTOCOL:
            if (value := row.get(f"recipe.{name}")) is not None:
                values.setdefault(name, {}).setdefault(str(row["backbone"]), set()).add(str(value))
    said = {n: {b: ", ".join(sorted(v)) for b, v in by.items()} for n, by in values.items()}
    return {
        n.replace("_", " "): next(iter(by.values())) if len(set(by.values())) == 1 else "; ".join(f"{b}: {v}" for b, v in by.items())
        for n, by in said.items()
    }  # fmt: skip


def render(title: str, rows: Sequence[Mapping[str, Any]], found: Sequence[Standing]) -> str:
    """The page as HTML, without anything from outside."""
    backbones = list(dict.fromkeys(s.backbone for s in found))
    tasks = sorted({str(r["task"]) for r in rows})
    return rendered(
        "report.html",
        title=title,
        cards=_cards(rows, found, backbones, tasks),
        hues={k: v for k, v in HUES.items() if any(s.group.startswith(k) for s in found)},
        sections=[_section(name, [s for s in found if s.backbone == name], measure(rows)) for name in backbones],
        protocol=protocol(rows),
        images={t: _images(rows, t) for t in tasks},
        measure=measure(rows),
    )


def _cards(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Standing], backbones: Sequence[str], tasks: Sequence[str]
) -> dict[str, str]:
    hours = sum(float(r.get("seconds") or 0) for r in rows) / 3600
    return {
        "trainings": f"{len(rows):,}",
        "backbones": str(len(backbones)),
        "methods": str(len({s.label for s in found})),
        "tasks": str(len(tasks)),
        **({"hours of training": f"{hours:.1f}"} if hours else {}),
    }


def _images(rows: Iterable[Mapping[str, Any]], task: str) -> dict[str, str]:
    """How many images a task was trained and measured on, and its classes."""
    own = [r for r in rows if r["task"] == task]
    keys = {"trained on": "images", "measured on": "images_measured", "classes": "classes"}
    spans = {name: _span([r[k] for r in own if r.get(k) is not None]) for name, k in keys.items()}
    return {**spans, "measured by": measure(own)}


def measure(rows: Iterable[Mapping[str, Any]]) -> str:
    """What rows are compared by."""
    return " or ".join(
        sorted({"top-1" if r.get("top1") is not None else "mAP" for r in rows if not r.get("stopped")}, reverse=True)
    )


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _section(backbone: str, own: Sequence[Standing], by: str) -> dict[str, Any]:
    """One backbone's plots, standings and tasks."""
    tasks = sorted({t for s in own for t in s.by_task})
    columns = {t: [s.by_task[t] for s in own if t in s.by_task] for t in tasks}
    return {
        "name": backbone,
        "plots": [svg for cost in COSTS if (svg := _plot(own, cost, by))],
        "rows": own,
        "hues": [_hue(s) for s in own],
        "tasks": tasks,
        "vtab": [row for s in own if (row := _vtab(s))],
        "cells": [[_task_cell(s, t, columns[t]) for t in tasks] for s in own],
    }


def _vtab(standing: Standing) -> dict[str, Any] | None:
    """Both means over VTAB-1k's tasks beside what was published; None where some of the tasks are missing."""
    found = means(standing.by_task)
    if found is None:
        return None
    known = () if "+" in standing.method else PUBLISHED.get(standing.method.partition("[")[0], ())
    published = "; ".join(f"{tasks:.1f} and {groups:.1f} in {source}" for tasks, groups, source in known)
    return {
        "label": standing.label,
        "tasks": found.tasks,
        "groups": found.groups,
        **found.by_group,
        "published": published,
    }


def _task_cell(standing: Standing, task: str, column: Sequence[float]) -> dict[str, str]:
    """Per cent, coloured between the task's worst and best, and the place among all methods."""
    value, scale = standing.by_task.get(task), [100 * v for v in column]
    shown = cell(
        None if value is None else 100 * value, RISING, min(scale), max(scale), f"{standing.label}, {task}: ", ".1f"
    )
    return {**shown, "place": f"{standing.places[task]:g}" if task in standing.places else ""}


def _hue(standing: Standing) -> str:
    return next((v for k, v in HUES.items() if standing.group.startswith(k)), OTHER)


def _plot(own: Sequence[Standing], cost: str, by: str) -> str:
    """Accuracy against one cost, with the Pareto front; nothing where the cost isn't known of two of them."""
    axis, unit = AXES[cost]
    points = [(getattr(s, cost) / unit, s) for s in own if s.complete and getattr(s, cost) is not None]
    if len(points) < 2:
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vtzoo", "font.size": 11, "axes.axisbelow": True}):
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        for x, s in points:
            shown: dict[str, Any] = {"ms": 7, "alpha": 1.0} if cost in s.fronts else {"ms": 5, "alpha": 0.5}
            bar = None if s.half is None else 100 * s.half
            axes.errorbar(x, 100 * s.mean, yerr=bar, fmt="o", color=_hue(s), elinewidth=0.8, **shown)
        _framed(axes, axis, f"mean {by}, %", [x for x, _ in points], [100 * s.mean for _, s in points])
        front = sorted((x, 100 * s.mean, s.label) for x, s in points if cost in s.fronts)
        axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="#1d2430", lw=1, drawstyle="steps-post")
        _labelled(axes, front)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _labelled(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, from the best one down; one that would lie on another is left out."""
    placed: list[tuple[float, float]] = []
    for x, y, label in reversed(points):
        u, v = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if any(abs(u - a) < 0.3 and abs(v - b) < 0.04 for a, b in placed):
            continue
        placed.append((u, v))
        left = u < 0.4  # no room before it
        place: dict[str, Any] = {"ha": "left", "va": "top"} if left else {"ha": "right", "va": "bottom"}
        at = (6, -5) if left else (-5, 4)
        axes.annotate(
            _short(label), (x, y), at, textcoords="offset points", fontsize=9, parse_math=False, **place
        ).set_in_layout(False)


def _framed(axes: Any, title: str, by: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Axes that the points fill, whatever their bars; logarithmic where costs differ by more than ten times."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

    if max(xs) > 10 * min(xs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if max(xs) >= 10_000 else FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.margins(x=0.08)
    room = 0.12 * (max(ys) - min(ys)) or 1.0
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_xlabel(title)
    axes.set_ylabel(by)
    axes.grid(color="#dfe3e9", lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"{label[:23]}…"

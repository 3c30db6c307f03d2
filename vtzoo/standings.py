"""How methods stand to each other over many tasks and seeds: means with intervals, ranks, PPT, Pareto fronts.

A contestant is a backbone with a method and the knobs that were varied; its score is top-1, or the mean average precision where images
have several labels. Its mean is over tasks, each task's over seeds and folds; the interval is Student's, 95 %, over seeds of the mean over
tasks: how far another draw of seeds would move it, the tasks held fixed.

    PPT = mean * exp(-log10(P / 10^7 + 1))     performance by parameters trained, head left out (V-PETL Bench, NeurIPS 2024)
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vtzoo.knobs import parse

Row = Mapping[str, Any]
DRAWN = ("recipe.seed", "recipe.fold")
"""Knobs over which results are averaged."""
COSTS = ("trained", "peak_bytes", "seconds")
"""What accuracy is set against, the less the better."""
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
"""Student's 97.5 % quantile by degrees of freedom, from 1 on; after the last 1.96."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One contestant.

    Attributes:
        backbone, method, knobs: who it is; knobs are those that were varied, as text.
        group: the survey's cell.
        by_task: mean score over seeds, a fraction.
        mean: over its tasks.
        half: half the width of the 95 % interval; None with fewer than two seeds that have every task.
        seeds: how many those are.
        runs: all rows.
        complete: whether it has every task of its backbone's contestants; only then it is ranked and may stand on a front.
        params: numbers trained, the head left out; `trained` with it: the largest over tasks.
        peak_bytes, seconds: median over its rows; None where none says.
        places: by task among the complete ones, ties sharing theirs; 1 is best. `rank` is their mean.
        ppt: see the module.
        fronts: the costs for which no complete one is both cheaper and better.
    """

    backbone: str
    method: str
    knobs: str
    group: str
    by_task: Mapping[str, float]
    mean: float
    half: float | None
    seeds: int
    runs: int
    complete: bool
    params: int
    trained: int
    peak_bytes: float | None
    seconds: float | None
    ppt: float
    rank: float | None = None
    places: Mapping[str, float] = field(default_factory=dict[str, float])
    fronts: tuple[str, ...] = field(default=())

    @property
    def label(self) -> str:
        """Method and varied knobs."""
        return f"{self.method} {self.knobs}".strip()


def score(row: Row, prefix: str = "") -> float | None:
    """The number by which runs are compared: top-1, or mAP; `prefix` is `val_` for that of the validation images."""
    top1 = row.get(f"{prefix}top1")
    return row.get(f"{prefix}map") if top1 is None else top1


def standings(rows: Iterable[Row]) -> list[Standing]:
    """Everyone's standing, by backbone, the best mean first.

    Args:
        rows: see `vtzoo.rows`; of several with the same contestant, task and seed the last counts. Those of a search (`stage`) are left
            out, whose knobs were chosen on the validation images and trained again; so are runs that were stopped early.
    """
    groups: dict[str, dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row, knobs in _varied([r for r in rows if r.get("stage") != "search" and score(r) is not None]):
        groups[row["backbone"]][_who(row)[1], knobs].append(row)
    found: list[Standing] = []
    for backbone, own in groups.items():
        tasks = {r["task"] for rows_ in own.values() for r in rows_}
        found += _ranked([_standing(backbone, *who, rows_, tasks) for who, rows_ in own.items()])
    return sorted(found, key=lambda s: (s.backbone, -s.mean))


def _varied(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Each row with the knobs that tell it from others of its backbone and method on the same task.

    What a task has alone tells nothing apart, nor does what was chosen for it: all knobs of a final, the best probe's rate.
    """
    differing: dict[tuple[str, str], dict[tuple[str, str], set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        chosen = _chosen(row)
        for key, value in row.items():
            if _tells(key) and value is not None and key not in chosen:
                differing[_who(row)][row["task"], key].add(repr(value))
    told: list[tuple[Row, str]] = []
    for row in rows:
        varied = {key for (_, key), values in differing[_who(row)].items() if len(values) > 1}
        keys = sorted(varied - _chosen(row))
        if "recipe.lr" in keys and row.get("recipe.head_lr") == row.get("recipe.lr"):
            keys = [k for k in keys if k != "recipe.head_lr"]
        told.append((row, " ".join(f"{k.removeprefix('recipe.')}={row.get(k)}" for k in keys)))
    return told


def _tells(key: str) -> bool:
    """Whether rows that differ in it may be different contestants."""
    return (key == "split" or key.startswith("recipe.")) and key not in DRAWN


def _chosen(row: Row) -> set[str]:
    """The keys of knobs that a search chose, task by task."""
    if row.get("stage") == "final":
        return {k for k in row if _tells(k)}
    spec = _who(row)[1]
    probes = parse(spec) if spec.startswith("linear[") else []
    rates = {"lr": ("recipe.lr", "recipe.head_lr"), "weight_decay": ("recipe.weight_decay",)}
    return {key for p in probes for knob in p.knobs for key in rates.get(knob, ())}


def _who(row: Row) -> tuple[str, str]:
    return row["backbone"], row.get("spec") or row["method"]


def _standing(backbone: str, method: str, knobs: str, rows: Sequence[Row], tasks: set[str]) -> Standing:
    top: dict[str, dict[Any, float]] = defaultdict(dict)
    for row in rows:
        if (value := score(row)) is not None:
            top[row["task"]][row["seed"], row.get("recipe.fold")] = value
    by_task = {task: statistics.fmean(seeds.values()) for task, seeds in sorted(top.items())}
    mean = statistics.fmean(by_task.values())
    shared = sorted(set.intersection(*(set(seeds) for seeds in top.values())), key=str)
    by_seed = [statistics.fmean(top[task][seed] for task in top) for seed in shared]
    params = max(int(r.get("params") or 0) for r in rows)
    return Standing(
        backbone=backbone, method=method, knobs=knobs, group=str(rows[0].get("group") or ""), by_task=by_task, mean=mean,
        half=_half(by_seed), seeds=len(shared), runs=len(rows), complete=set(by_task) == tasks, params=params,
        trained=max(int(r.get("params") or 0) + int(r.get("head_params") or 0) for r in rows), peak_bytes=_median(rows, "peak_bytes"),
        seconds=_median(rows, "seconds"), ppt=mean * math.exp(-math.log10(params / 1e7 + 1)),
    )  # fmt: skip


def _half(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    return (T95[n - 2] if n - 2 < len(T95) else 1.96) * statistics.stdev(values) / math.sqrt(n)


def _median(rows: Sequence[Row], key: str) -> float | None:
    known = [r[key] for r in rows if r.get(key) is not None]
    return statistics.median(known) if known else None


def _ranked(found: Sequence[Standing]) -> list[Standing]:
    """The contestants of one backbone with their mean ranks and fronts."""
    full = [s for s in found if s.complete]
    places = {id(s): {t: _place(v, [o.by_task[t] for o in full]) for t, v in s.by_task.items()} for s in full}
    ranks = {who: statistics.fmean(own.values()) for who, own in places.items()}
    fronts = {id(s): tuple(c for c in COSTS if _undominated(s, full, c)) for s in full}
    return [
        replace(s, rank=ranks.get(id(s)), places=places.get(id(s), {}), fronts=fronts.get(id(s), ())) for s in found
    ]


def _place(value: float, all_values: Sequence[float]) -> float:
    """1 for the best; equal ones share the mean of their places."""
    better, equal = sum(v > value for v in all_values), sum(v == value for v in all_values)
    return better + (equal + 1) / 2


def _undominated(one: Standing, others: Sequence[Standing], cost: str) -> bool:
    """Whether nobody is as good for less, or better for as much."""
    mine = getattr(one, cost)
    known = [(getattr(o, cost), o.mean) for o in others if getattr(o, cost) is not None]
    return mine is not None and not any(
        (cheap < mine and mean >= one.mean) or (cheap <= mine and mean > one.mean) for cheap, mean in known
    )

"""Standings: means, intervals, ranks, PPT and fronts, each beside numbers worked out by hand."""

import math
from typing import Any

import pytest

from vtzoo.standings import standings


def row(method: str, task: str, top1: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """One training."""
    facts = {
        "backbone": "b",
        "group": "parameter/weight",
        "params": 100,
        "head_params": 10,
        "peak_bytes": 5,
        "seconds": 1.0,
    }
    return {**facts, "method": method, "task": task, "top1": top1, "seed": seed, **more}


def test_means_over_tasks_of_means_over_seeds() -> None:
    """A task with more seeds weighs no more than another; the interval is Student's over the seeds that have every task."""
    rows = [row("a", "x", 0.2), row("a", "x", 0.4, 1), row("a", "x", 0.9, 2), row("a", "y", 0.6), row("a", "y", 0.8, 1)]
    (found,) = standings(rows)
    assert found.by_task == {"x": pytest.approx(0.5), "y": pytest.approx(0.7)}
    assert found.mean == pytest.approx(0.6)
    assert found.seeds == 2  # means .4 and .6: deviation .1414, over the root of 2 times 12.706
    assert found.half == pytest.approx(12.706 * 0.1)


def test_what_a_search_chose_tells_nobody_apart() -> None:
    """The best of many probes has another rate on each task, and is one contestant; a rate that was given is another's."""
    probes = {"spec": "linear[lr=1e-4|1e-2]"}
    rows = [
        row("linear", "x", 0.5, **probes, **{"recipe.lr": 1e-4, "recipe.head_lr": 1e-4}),
        row("linear", "x", 0.7, 1, **probes, **{"recipe.lr": 1e-2, "recipe.head_lr": 1e-2}),
        row("linear", "y", 0.6, **probes, **{"recipe.lr": 1e-2, "recipe.head_lr": 1e-2}),
        row("bitfit", "x", 0.5, **{"recipe.lr": 1e-4}),
        row("bitfit", "x", 0.6, **{"recipe.lr": 1e-2}),
        row("bitfit", "y", 0.6, **{"recipe.lr": 1e-2}),
    ]
    found = {s.label: (s.by_task, s.complete) for s in standings(rows)}
    assert found == {
        "linear[lr=1e-4|1e-2]": ({"x": pytest.approx(0.6), "y": 0.6}, True),
        "bitfit lr=0.01": ({"x": 0.6, "y": 0.6}, True),
        "bitfit lr=0.0001": ({"x": 0.5}, False),
    }


def test_tasks_may_have_knobs_of_their_own() -> None:
    """A number of epochs that differs between tasks alone makes no two contestants of one."""
    (found,) = standings([row("a", "x", 0.5, **{"recipe.epochs": 1}), row("a", "y", 0.7, **{"recipe.epochs": 2})])
    assert (found.label, found.mean, found.complete) == ("a", pytest.approx(0.6), True)


def test_ranks_are_shared_by_equals() -> None:
    """Places by task, equal ones in the middle of theirs, then the mean; who lacks a task has none."""
    rows = [
        row("a", "x", 0.9),
        row("b", "x", 0.5),
        row("c", "x", 0.5),
        row("a", "y", 0.1),
        row("b", "y", 0.2),
        row("c", "y", 0.3),
    ]
    found = standings([*rows, row("d", "x", 1.0)])
    places = {s.method: s.places for s in found}
    assert places == {"a": {"x": 1, "y": 3}, "b": {"x": 2.5, "y": 2}, "c": {"x": 2.5, "y": 1}, "d": {}}
    rank = {s.method: s.rank for s in found}
    assert rank == {"a": 2.0, "b": (2.5 + 2) / 2, "c": (2.5 + 1) / 2, "d": None}


def test_ppt_is_the_published_number() -> None:
    """LoRA's row of V-PETL Bench: 72.25 with 0.29 million numbers gives .71; the head does not count."""
    (found,) = standings([row("lora", "x", 0.7225, params=290_000, head_params=10**6)])
    assert round(found.ppt, 2) == 0.71
    assert found.ppt == pytest.approx(0.7225 * math.exp(-math.log10(0.029 + 1)))
    assert found.trained == 1_290_000


def test_fronts_hold_what_nobody_beats() -> None:
    """Neither cheaper and as good, nor better for as much; each cost by itself; unknown costs are on no front."""
    rows = [
        row("small", "x", 0.5, params=1, seconds=9.0),
        row("worse", "x", 0.4, params=5, seconds=8.0),
        row("large", "x", 0.9, params=9, seconds=1.0),
        row("as good", "x", 0.9, params=10, seconds=1.0, peak_bytes=None),
    ]
    fronts = {s.method: set(s.fronts) for s in standings(rows)}
    assert fronts == {
        "small": {"trained"},
        "worse": set(),
        "large": {"trained", "peak_bytes", "seconds"},
        "as good": {"seconds"},
    }


def test_varied_knobs_tell_contestants_apart() -> None:
    """Runs that differ by a knob alone are not averaged, not even as two seeds; a method's own rate is no variation."""
    rows = [row("a", "x", 0.5, seed=i, **{"recipe.lr": lr, "recipe.epochs": 5}) for i, lr in enumerate((0.1, 0.2))]
    found = standings([*rows, row("b", "x", 0.6, **{"recipe.lr": 0.3})])
    assert [s.label for s in found] == ["b", "a lr=0.1", "a lr=0.2"]


def test_folds_are_averaged_and_splits_are_not() -> None:
    """A fold is a draw as a seed is; accuracies on validation and test images are two things."""
    folds = [row("a", "x", t, **{"recipe.fold": i}) for i, t in enumerate((0.2, 0.4))]
    (found,) = standings(folds)
    assert (found.mean, found.seeds) == (pytest.approx(0.3), 2)
    assert len(standings([row("a", "x", 0.8, split="val"), row("a", "x", 0.5, 1, split="test")])) == 2


def test_finals_with_knobs_of_each_task_are_one_contestant() -> None:
    """What was chosen task by task stands as its method, and the search beside it doesn't."""
    rows = [row(f"a[rank={r}]", t, 0.5, stage="final", spec="a", **{"recipe.lr": r}) for r, t in ((4, "x"), (8, "y"))]
    (found,) = standings([*rows, row("a[rank=4]", "x", 0.9, stage="search")])
    assert (found.label, found.complete, found.rank, found.mean) == ("a", True, 1.0, 0.5)


def test_backbones_do_not_meet() -> None:
    """A method is ranked among those on its own backbone."""
    found = standings([row("a", "x", 0.5), row("a", "x", 0.7, backbone="c")])
    assert [(s.backbone, s.rank) for s in found] == [("b", 1.0), ("c", 1.0)]

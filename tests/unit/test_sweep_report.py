"""The page of a sweep: what stands on it for rows whose numbers are known."""

from typing import Any

from vtzoo.standings import standings
from vtzoo.sweep_report import protocol, render
from vtzoo.vtab import TASKS


def row(task: str, method: str = "lora", **more: Any) -> dict[str, Any]:
    """One training."""
    facts = {
        "backbone": "b",
        "method": method,
        "group": "parameter/weight",
        "task": task,
        "seed": 0,
        "top1": 0.5,
        "params": 10,
    }
    return {
        **facts,
        "head_params": 5,
        "images": 1000,
        "images_measured": 300,
        "classes": 3,
        "recipe.epochs": 100,
        **more,
    }


def test_vtab_stands_beside_what_is_published() -> None:
    """With all 19 tasks both means are there, and other people's; with one too few they are not."""
    rows = [row(t) for t in sorted(TASKS)]
    text = render("VTAB", rows, standings(rows))
    assert "72.2 and 74.6 in V-PETL Bench" in text
    assert "72.9 and 75.2 in Mai et al. 2024" in text
    assert "<h3>VTAB-1k</h3>" not in render("VTAB", rows[1:], standings(rows[1:]))


def test_the_protocol_is_told_where_it_differs() -> None:
    """A knob that is the same everywhere stands once, one that isn't by backbone."""
    rows = [row("x"), row("x", backbone="c", **{"recipe.image_size": 112}), row("y", **{"recipe.image_size": 64})]
    assert protocol(rows) == {"epochs": "100", "image size": "c: 112; b: 64"}


def test_what_is_written_by_people_is_escaped() -> None:
    """A title or a method's knob is text, whatever it looks like."""
    rows = [row("x", method="<b>&"), row("x", method="b")]
    text = render("<script>", rows, standings(rows))
    assert "<script>" not in text
    assert "<b>&" not in text

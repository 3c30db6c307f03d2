"""Pages that stand alone: HTML without anything from outside, and the same numbers as JSON beside it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtzoo.errors import Conflict, NotFound, UsageError
from vtzoo.files import atomic_text

RISING = ("#fdfaf3", "#f0a860", "#7f2704")
"""Colours from little to much."""


def ready(page: Path, needs: Iterable[str] = ("jinja2",)) -> None:
    """Refuse before anything is computed what would fail at the end.

    Args:
        page: the HTML file to be.
        needs: packages that make it.

    Raises:
        UsageError: a package is missing, or the file is no .html.
        NotFound: the folder is missing.
        Conflict: the page, or the JSON beside it, exists.
    """
    if missing := [name for name in needs if find_spec(name) is None]:
        raise UsageError(f"a report needs {' and '.join(missing)}", "pip install 'vtzoo[report]'")
    if page.suffix != ".html":
        raise UsageError(f"{page} is no .html", f"for example {page.with_suffix('.html')}")
    if not page.parent.is_dir():
        raise NotFound(f"{page.parent} does not exist", f"make it: mkdir -p {page.parent}")
    for path in (page, page.with_suffix(".json")):
        if path.exists():
            raise Conflict(f"{path} exists already", "choose another place, or remove it first")


def rendered(template: str, **values: Any) -> str:
    """One of `pages/` filled in."""
    import jinja2

    def source(name: str) -> str:
        return files("vtzoo").joinpath("pages", name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FunctionLoader(source)
    )
    return environment.get_template(template).render(**values)


def keep(page: Path, text: str, facts: Mapping[str, Any]) -> None:
    """Write the page, and the JSON beside it."""
    atomic_text(page.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    atomic_text(page, text)


def cell(
    value: float | None, colours: Sequence[str], low: float, high: float, before: str = "", form: str = ".2f"
) -> dict[str, str]:
    """A number of a coloured table: its colour between `low` and `high`, the ink on it, its text, what is said when it is pointed at."""
    if value is None:
        return {"colour": "#fff", "ink": "#999", "text": "", "title": f"{before}none"}
    place = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0) * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    pairs = zip(_rgb(colours[first]), _rgb(colours[first + 1]), strict=True)
    mixed = [round(a + (b - a) * (place - first)) for a, b in pairs]
    dark = 0.3 * mixed[0] + 0.6 * mixed[1] + 0.1 * mixed[2] < 140
    return {
        "colour": "#" + "".join(f"{c:02x}" for c in mixed), "ink": "#fff" if dark else "#1d2430", "text": format(value, form),
        "title": f"{before}{value:.3g}",
    }  # fmt: skip


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))

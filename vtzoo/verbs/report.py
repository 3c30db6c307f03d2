"""Tables and plots of what was trained: one page that stands alone."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vtzoo.errors import NotFound
from vtzoo.page import ready
from vtzoo.results import Reported
from vtzoo.rows import rows_of
from vtzoo.sweep_report import NEEDS, save
from vtzoo.zoo import Zoo


def report(*, refs: Sequence[str] = (), out: Path, title: str = "", zoo: Zoo | None = None) -> Reported:
    """Compare deltas of a zoo, or the rows of tables: accuracy against parameters, memory and time, tasks, ranks, intervals.

    Args:
        refs: names, patterns such as `fashion/*`, or tables (./x.jsonl, ./x.parquet); none stands for every trained delta.
        out: the page, .html; its numbers are written beside it as .json.
        title: of the page; its file's name by default.
        zoo: where the names are looked up.

    Returns:
        `report`: rows, and the standings (see `vtzoo.standings`).

    Raises:
        UsageError: a package is missing, or `out` is no .html.
        NotFound: a ref means nothing, nothing was trained, or the folder is missing.
        Conflict: the page exists.
    """
    ready(out, NEEDS)
    rows = rows_of(refs, zoo or Zoo.find())
    if not rows:
        raise NotFound(
            "there is nothing to report: no delta here was trained and measured", "vtzoo train, or vtzoo sweep"
        )
    found = save(out, title or out.stem, rows)
    return Reported(ref="", path=str(out), report={"rows": len(rows), "standings": [asdict(s) for s in found]})

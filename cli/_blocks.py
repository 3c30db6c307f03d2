"""What a human reads, as data: lines and tables that `_render` prints and the docs script writes as Markdown."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; columns named in `right` hold numbers."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""
    right: frozenset[str] = field(default_factory=frozenset[str])


@dataclass(frozen=True, slots=True)
class Tree:
    """A line of text, and what hangs on it."""

    text: str
    below: list["Tree"] = field(default_factory=list["Tree"])


Block = Line | Table | Tree


def indented(tree: Tree, depth: int = 0) -> list[str]:
    """Lay a tree out, two blanks a level: the form for pipes and files."""
    return ["  " * depth + tree.text, *(line for t in tree.below for line in indented(t, depth + 1))]


def plain(table: Table) -> list[str]:
    """Lay a table out in aligned columns, two spaces apart: the form for pipes and files."""
    widths = [max(len(row[i]) for row in [table.columns, *table.rows]) for i in range(len(table.columns))]
    right = [name in table.right for name in table.columns]
    lines = [table.title] if table.title else []
    for row in [table.columns, *table.rows]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(table: Table) -> list[str]:
    """Write a table as Markdown."""
    rule = ["---:" if name in table.right else "---" for name in table.columns]
    rows = [tuple(c.replace("|", "\\|") for c in row) for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in (table.columns, rule, *rows)]


def size(count: float | None) -> str:
    """Bytes for people: 12.3 MB (powers of ten)."""
    return "" if count is None else _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def number(count: float | None) -> str:
    """A count of parameters for people: 22.1 M."""
    return "" if count is None else _scaled(count, ("", "k", "M", "G", "T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if power == 0 else f"{value:.1f}"
    return f"{text} {units[power]}".rstrip()

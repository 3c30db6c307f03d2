"""Images that bear several labels each, or none: a table beside them says which, as in Hugging Face's imagefolder.

    metadata.csv      file_name,labels          metadata.jsonl      {"file_name": "1.jpg", "labels": ["cat", "dog"]}
                      1.jpg,cat|dog

A table stands above all images or in each split's folder; `file_name` counts from there. One without `labels` says nothing here.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vtzoo._images import Contents, Decoder, Images, Tree
from vtzoo._layout import ALIASES, Split, members
from vtzoo.errors import Corrupt, UsageError

Table = Mapping[str, tuple[str, ...]]
FILES = ("metadata.jsonl", "metadata.csv")


def several(tree: Tree, names: Sequence[str], split: Split, side: int) -> Images | None:
    """One split of such images, `names` being all of the tree's; None where no table has labels.

    Raises:
        UsageError: an image without a row, a row without an image or twice, fewer than two labels.
        Corrupt: a table that can't be read.
        NotFound: a split layout without this split.
    """
    table = _table(tree, names)
    if table is None:
        return None
    every = sorted(names)
    layout: dict[str, list[str]] = {}
    for name in every:
        if found := ALIASES.get(name.split("/", 1)[0].lower(), "") if "/" in name else "":
            layout.setdefault(found, []).append(name)
    _check(table, [n for names in layout.values() for n in names] or every, tree.where)
    classes = tuple(sorted({label for labels in table.values() for label in labels}))
    if len(classes) < 2:
        raise UsageError(f"{tree.where} has {len(classes)} labels", "a task needs two or more")
    place = {c: i for i, c in enumerate(classes)}
    paths = tuple(members(layout, every, split, tree.where))
    return Images(
        classes=classes,
        paths=paths,
        labels=(-1,) * len(paths),
        several=tuple(tuple(sorted(place[c] for c in set(table[n]))) for n in paths),
        identity=Contents(tree, {n: json.dumps(sorted(set(labels))) for n, labels in table.items()}),
        load=Decoder(tree, side),
        where=tree.where,
    )


def _check(table: Table, names: Sequence[str], where: str) -> None:
    if alone := sorted(set(names) - set(table)):
        raise UsageError(
            f"{where}: {len(alone)} images have no row in the table, first {alone[0]}", "add file_name,labels"
        )
    if missing := sorted(set(table) - set(names)):
        raise UsageError(
            f"{where}: {len(missing)} rows have no image, first {missing[0]}", "remove them from the table"
        )


def _table(tree: Tree, every: Sequence[str]) -> Table | None:
    """Labels by image, of all tables that have them."""
    found: dict[str, tuple[str, ...]] = {}
    seen = False
    for place in ("", *sorted({f"{n.split('/', 1)[0]}/" for n in every if "/" in n and _is_split(n)})):
        for name in FILES:
            for file, labels in _rows(tree, f"{place}{name}"):
                seen, path = True, f"{place}{file}"
                if path in found:
                    raise UsageError(
                        f"{tree.where}: {path} stands twice in the tables", "give all its labels in one row"
                    )
                found[path] = labels
    return found if seen else None


def _is_split(name: str) -> bool:
    return name.split("/", 1)[0].lower() in ALIASES


def _rows(tree: Tree, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """File and labels, row by row; none where there is no such table, or none with labels."""
    try:
        text = tree.read(name).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, KeyError):  # a zip's has a name or not
        return
    except UnicodeDecodeError as error:
        raise Corrupt(f"{tree.where}: {name} is not text ({error})", "write it as UTF-8") from error
    try:
        rows = _json(text) if name.endswith("l") else _csv(text)
        for row in rows:
            if "labels" in row:
                yield str(row["file_name"]).replace("\\", "/").removeprefix("./"), _labels(row["labels"])
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise Corrupt(
            f"{tree.where}: {name} is no table of file_name and labels ({error})", "write one row an image"
        ) from error


def _csv(text: str) -> list[dict[str, Any]]:
    """Rows with as many cells as the header: one cell more or less is a label that nobody would see."""
    head, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(head)}; labels have | between")
    return [dict(zip(head, row, strict=True)) for row in rows]


def _json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _labels(said: Any) -> tuple[str, ...]:
    """The labels of a list, or of text with | between."""
    each = said if isinstance(said, list) else str(said or "").split("|")
    return tuple(label for label in (str(one).strip() for one in each) if label)

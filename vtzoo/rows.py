"""What was trained, as a table: one flat row for each delta of a zoo, in JSON lines or Parquet."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtzoo import files, knobs, registry
from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean
from vtzoo.headers import read_header
from vtzoo.refs import Entry, as_path
from vtzoo.standings import score
from vtzoo.zoo import Zoo

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")
MEASURED = ("seconds", "cpu_seconds", "peak_bytes")
"""Of the training, in the index: they are of a machine and a moment, and not of the artifact."""


def row_of(entry: Entry, zoo: Zoo) -> Row:
    """A trained delta's row.

    Returns:
        ref, digest, task, classes, backbone, method (its spec as trained), spec (as asked for, where a search composed it), group (the survey's cell), seed, images; params and
        head_params (numbers that it holds), size_bytes; split (test, else val) and top1 (of several labels map) and more on its images_measured, val_top1 (val_map);
        seconds, cpu_seconds and peak_bytes of its training, where they are known; and every knob of its recipe as `recipe.KNOB`.

    Raises:
        Corrupt: its file is damaged.
    """
    path = zoo.object(entry.digest)
    doc = read_header(path)
    metrics, task = doc["metrics"], doc["tasks"][0] if doc["tasks"] else {"name": "", "classes": []}
    split = next((s for s in ("test", "val") if s in metrics), "")
    sizes = {n: math.prod(t.shape) for n, t in files.header(path).tensors.items()}
    return {
        "ref": entry.name, "digest": entry.digest, "task": task["name"], "classes": len(task["classes"]),
        "backbone": doc["backbone"]["name"], "method": doc["method"], "spec": doc["lineage"].get("composed_by", doc["method"]), "group": _group(doc["method"]),
        "seed": doc["lineage"].get("seed"), "images": doc["lineage"].get("images"),
        "params": sum(n for name, n in sizes.items() if not name.startswith("@")),
        "head_params": sum(n for name, n in sizes.items() if name.startswith("@head/")),
        "size_bytes": entry.facts.get("size_bytes"), "split": split,
        **{"images_measured" if k == "images" else k: v for k, v in metrics.get(split, {}).items()},
        **{f"val_{k}": v for k, v in metrics.get("val", {}).items() if k in ("top1", "map")}, **{k: entry.facts.get(k) for k in MEASURED},
        **{f"recipe.{k}": v for k, v in doc.get("recipe", {}).items()},
    }  # fmt: skip


def _group(spec: str) -> str:
    """The survey's cell of a stack: its first part's."""
    name = knobs.parse(spec)[0].name
    return registry.card("methods", name).group if name in registry.names("methods") else ""


def rows_of(refs: Sequence[str], zoo: Zoo) -> list[Row]:
    """The rows that refs stand for: tables on the disk, names, patterns such as `fashion/*`; of none, every trained delta.

    Raises:
        NotFound: a ref or pattern means nothing.
        Corrupt: a table that is none.
    """
    found: dict[tuple[str, Any], Row] = {}
    entries = zoo.entries("deltas")
    for ref in refs or ("*",):
        if ref.endswith(SUFFIXES):
            found |= {(str(r.get("ref") or ref), r.get("digest") or i): r for i, r in enumerate(read(as_path(ref)))}
            continue
        wild = "*" in ref or "?" in ref
        own = [e for e in entries if fnmatchcase(e.name, ref)] if wild else [zoo.resolve(ref, "deltas")]
        if not own and refs:
            raise NotFound(
                f"no delta is called like '{ref}'", did_you_mean(ref, [e.name for e in entries]) or "vtzoo ls"
            )
        found |= {(e.name, e.digest): row_of(e, zoo) for e in own}
    return [r for r in found.values() if score(r) is not None]


def read(path: Path) -> list[Row]:
    """Read a table.

    Raises:
        NotFound: no such file.
        Corrupt: not what its name says.
        UsageError: Parquet needs pyarrow.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}", "vtzoo sweep writes one")
    try:
        if path.suffix == ".parquet":
            found = _parquet().read_table(path).to_pylist()
        else:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for i, row in enumerate(found):
            _check_row(row, i + 1)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise Corrupt(f"{path} is no table: {error}", "write it again: vtzoo sweep SPEC.yaml --table FILE") from None
    return found


def _check_row(row: Any, number: int) -> None:
    """Refuse what no comparison can be made of.

    Raises:
        ValueError: says which row.
    """
    if lacking := _lacking(row if isinstance(row, dict) else {}):
        raise ValueError(f"row {number} has no {lacking}")
    row.setdefault("seed", None)


def _lacking(row: Mapping[str, Any]) -> str:
    """What a row should have and hasn't."""
    for key in ("backbone", "method", "task"):
        if not isinstance(row.get(key), str):
            return key
    measured = score(row)
    if not row.get("stopped") and not (measured is not None and _number(measured) and 0 <= measured <= 1):
        return "top1 or map between 0 and 1"
    for key in ("params", "head_params", "classes", "images", "images_measured", *MEASURED):
        if row.get(key) is not None and not _number(row[key]):
            return f"number as its {key}"
    return "" if isinstance(row.get("seed"), int | str | None) else "number as its seed"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table atomically; in Parquet lists and maps are JSON text."""
    if path.suffix == ".parquet":
        import io

        kept, columns = [{k: _flat(v) for k, v in r.items()} for r in rows], dict[str, None]()
        for row in kept:
            columns |= dict.fromkeys(row)
        import pyarrow as pa

        buffer = io.BytesIO()
        _parquet().write_table(pa.table({c: [r.get(c) for r in kept] for c in columns}), buffer)
        with files.atomic_write(path) as out:
            out.write(buffer.getvalue())
        return
    files.atomic_text(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows))


def check(path: Path) -> None:
    """Refuse a table that could not be written in the end.

    Raises:
        UsageError: another ending, or Parquet without pyarrow.
        NotFound: its folder is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is neither .jsonl nor .parquet", f"for example {path.with_suffix('.jsonl')}")
    if not path.parent.is_dir():
        raise NotFound(f"{path.parent} does not exist", f"make it: mkdir -p {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} can't be written", "choose another place for the table")
    if path.suffix == ".parquet":
        _parquet()


def _parquet() -> Any:
    if find_spec("pyarrow") is None:
        raise UsageError("Parquet needs pyarrow", "pip install 'vtzoo[report]', or choose .jsonl")
    import pyarrow.parquet

    return pyarrow.parquet


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value

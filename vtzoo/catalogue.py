"""Index files as text (read with lines in every complaint, written the same each time) and the built-in one.

The built-in catalogue is the repository's own `zoo_index.yaml`, marked `catalogue: true`: a resource of the installed
package, or the file next to the package's folder in a checkout. An index is plain data: no tags, no anchors, no
aliases, no key twice, a few levels deep.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from vtzoo.errors import Corrupt, Mismatch, UsageError, did_you_mean
from vtzoo.files import reading
from vtzoo.refs import SECTIONS, Entry, Section, check_facts, check_name, shown
from vtzoo.remembered import recall, remember

INDEX = "zoo_index.yaml"
SCHEMA = 1

Facts = dict[str, Any]
Sections = dict[Section, dict[str, Facts]]

_FAST = hasattr(yaml, "CSafeLoader")
_Loader: Any = yaml.CSafeLoader if _FAST else yaml.SafeLoader
LIMIT_BYTES = 32 << 20
"""Of an index; the limit on values is met sooner, at some 34,000 entries as training writes them."""

_DEPTH_LIMIT = 16
_VALUE_LIMIT, WORD_LIMIT = 1_000_000, 1 << 16
_TOO_DEEP = f"it is nested more than {_DEPTH_LIMIT} levels deep"
_WIDTH = 1 << 20  # no folding: one fact, one line
_NOTHING: tuple[Any, str] = (None, "")
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp")}


class _Dumper(yaml.CSafeDumper if _FAST else yaml.SafeDumper):  # type: ignore[misc] - either class, chosen once
    """Writes a value that stands twice twice, instead of an alias."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - yaml's signature
        return True


@dataclass(frozen=True, slots=True)
class Index:
    """A zoo's table: entries by section and name; a catalogue is never written to."""

    sections: Sections = field(default_factory=lambda: {s: {} for s in SECTIONS})
    catalogue: bool = False


def parse(data: bytes, where: Path) -> Index:
    """Read an index; each call gives a fresh copy, and the same content again isn't read again.

    Raises:
        Corrupt: not UTF-8, not YAML, or not an index; the message has the file and the line.
        Mismatch: written by a newer vtzoo.
    """
    content = json.loads(_content(data, where))
    return Index(content["sections"], catalogue=content["catalogue"])


def read(path: Path) -> bytes:
    """An index file's content, and no more of it than `parse` refuses.

    Raises:
        NotFound: no such file.
    """
    with reading(path), path.open("rb") as file:
        return file.read(LIMIT_BYTES + 1)


def check(data: bytes, where: Path) -> None:
    """Refuse what `parse` refuses."""
    _content(data, where)


@lru_cache(maxsize=4)
def _content(data: bytes, where: Path) -> str:
    """An index's content as JSON text, of which each reader makes a copy of its own."""
    known = recall(data)
    if known is None:
        known = _json(_read(data, where))
        remember(data, known)
    return known


def _json(index: Index, *, written: bool = False) -> str:
    """`written`: by `dump`, so that the text has its form."""
    return json.dumps({"catalogue": index.catalogue, "sections": index.sections, "written": written}, sort_keys=True)


def _read(data: bytes, where: Path) -> Index:
    if len(data) > LIMIT_BYTES:
        raise Corrupt(f"{where} has more than {LIMIT_BYTES} bytes", "an index is small: take it from git or a backup")
    try:
        reader = _Reader(data.decode("utf-8-sig"))
        return _index(reader.document(), reader.lines)
    except UnicodeDecodeError as error:
        reason, line = "not UTF-8", data.count(b"\n", 0, error.start) + 1
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason, line = error.problem or "not YAML", mark.line + 1 if mark else 1
        if "nesting depth" in reason:  # libyaml, as PyYAML 6.0.4 carries it, stops before our own count does
            reason = _TOO_DEEP
    except yaml.reader.ReaderError as error:
        reason, line = error.reason, data.decode("utf-8-sig").count("\n", 0, error.position) + 1
    except _Wrong as error:
        reason, line = str(error), error.line
    hint = "mend the line by hand, or take the file from git or a backup"
    if b"\n<<<<<<< " in data or data.startswith(b"<<<<<<< "):
        hint = "git left its conflict marks in it: keep both sides' entries, each with all of its lines, and remove the marks"
    raise Corrupt(f"{where}, line {line}: {' '.join(reason.split())}", hint)


def dump(index: Index, before: bytes = b"") -> str:
    """Write an index: sorted, one fact a line, the same text for the same content.

    Args:
        index: what to write.
        before: the file's content until now. Where that is a text of this function's, the entries that stay as they
            are are copied from it: of a large zoo, all but one.

    Raises:
        UsageError: a fact is no plain JSON value, or something that `parse` would refuse for its size.
    """
    same = {} if index.catalogue else _blocks(before)
    new: Sections = {
        s: {n: f for n, f in t.items() if same.get((s, n), _NOTHING)[0] != f} for s, t in index.sections.items()
    }
    _check_plain(new)
    text = _dumped(new, catalogue=index.catalogue)
    if same:
        made = _split(text, new)
        parts = {s: [made.get((s, n)) or same[s, n][1] for n in sorted(t)] for s, t in index.sections.items()}
        listed = (f"{s}:\n{''.join(parts[s])}" if parts[s] else f"{s}: {{}}\n" for s in SECTIONS)
        text = f"{''.join(listed)}schema: {SCHEMA}\n"
    _check_size(text, index.sections)
    remember(text.encode(), _json(index, written=True))
    return text


def _dumped(sections: Sections, *, catalogue: bool) -> str:
    content: dict[str, Any] = {"schema": SCHEMA, **sections}
    if catalogue:
        content["catalogue"] = True
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=None, allow_unicode=True, width=_WIDTH)


def _blocks(data: bytes) -> dict[tuple[str, str], tuple[Facts, str]]:
    """The facts and the lines of each entry of a large index that `dump` wrote; else nothing."""
    known = json.loads(recall(data) or "{}")
    if not known.get("written") or known["catalogue"]:
        return {}
    lines = _split(data.decode(), known["sections"])
    return {(s, n): (known["sections"][s][n], own) for (s, n), own in lines.items()}


def _split(text: str, sections: Sections) -> dict[tuple[str, str], str]:
    """The lines of each entry: `dump` indents names by two spaces, and all that belongs to them by more.

    A name of more than 128 characters stands as "  ? name", and what belongs to it begins with "  : " on the next line.
    """
    pieces = [p for p in re.split(r"(?m)^(?=\S|  [^\s:])", text) if p.startswith("  ")]
    keys = [(s, n) for s in SECTIONS for n in sorted(sections[s])]
    return dict(zip(keys, pieces, strict=True))


@cache
def builtin_path() -> Path | None:
    """Where the built-in catalogue is; None when this installation has none."""
    package = Path(__file__).parent
    places = (package / INDEX, package.parent / INDEX)
    return next((p for p in places if p.is_file() and is_catalogue(p)), None)


def builtin() -> list[Entry]:
    """The entries of the built-in catalogue, each a fresh copy."""
    return [Entry(s, name, deepcopy(f), builtin=True) for s, table in _builtin().items() for name, f in table.items()]


@cache
def _builtin() -> Sections:
    path = builtin_path()
    return Index().sections if path is None else parse(path.read_bytes(), path).sections


def is_catalogue(path: Path) -> bool:
    """Whether an index file says `catalogue: true`; read without parsing it."""
    with reading(path):
        return bool(re.search(rb"(?m)^catalogue:[ \t]+true[ \t\r]*$", path.read_bytes()))


class _Wrong(Exception):
    """Becomes Corrupt, with the file and the line."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _Reader:
    """Builds plain values from YAML events (composing nodes would crash in C on deep nesting)."""

    def __init__(self, text: str) -> None:
        self._loader = _Loader(text)
        self._count = 0
        self.lines: dict[tuple[str, ...], int] = {(): 1}  # of sections and entries

    def document(self) -> Any:
        """Read the one document."""
        try:
            self._next()
            start = self._next()
            if isinstance(start, yaml.StreamEndEvent):
                raise _Wrong("it is empty", 1)
            value = self._value(self._next(), ())
            self._next()
            if not isinstance(rest := self._next(), yaml.StreamEndEvent):
                raise _Wrong("a second document starts here", self._line(rest))
            return value
        finally:
            self._loader.dispose()

    def _next(self) -> Any:
        return self._loader.get_event()

    def _line(self, event: Any) -> int:
        return event.start_mark.line + 1

    def _value(self, event: Any, path: tuple[str, ...]) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise _Wrong("an index has no aliases", self._line(event))
        if event.anchor or event.tag not in (None, "!"):
            raise _Wrong("an index has no anchors and no tags", self._line(event))
        if len(path) > _DEPTH_LIMIT:
            raise _Wrong(_TOO_DEEP, self._line(event))
        self._count += 1
        if self._count > _VALUE_LIMIT:
            raise _Wrong(f"it has more than {_VALUE_LIMIT} values", self._line(event))
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        return self._map(path) if isinstance(event, yaml.MappingStartEvent) else self._list(path)

    def _scalar(self, event: Any) -> Any:
        if len(event.value) > WORD_LIMIT:
            raise _Wrong(f"a word of {len(event.value)} characters", self._line(event))
        tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag in _TEXT:
            return event.value
        if tag not in _SCALARS:
            raise _Wrong(f"{shown(event.value)} must stand in quotes", self._line(event))
        try:
            node = yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark)
            return self._loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise _Wrong(f"{shown(event.value)} is no number", self._line(event)) from error

    def _map(self, path: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._value(event, path) if isinstance(event, yaml.ScalarEvent | yaml.AliasEvent) else None
            if not isinstance(key, str):
                raise _Wrong(f"the key {shown(key)} is no text: put it in quotes", self._line(event))
            if key in found:
                raise _Wrong(f"'{key}' stands twice", self._line(event))
            if len(path) < 2:
                self.lines[*path, key] = self._line(event)
            found[key] = self._value(self._next(), (*path, key))
        return found

    def _list(self, path: tuple[str, ...]) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._value(event, (*path, "-")))
        return found


def _index(content: Any, lines: Mapping[tuple[str, ...], int]) -> Index:
    if not isinstance(content, dict):
        raise _Wrong("a map with schema, backbones, deltas and models is wanted", 1)
    content = cast("dict[str, Any]", content)
    schema = content.get("schema")
    if type(schema) is not int or schema < 1:
        raise _Wrong(f"the schema is {shown(schema)}; write 'schema: {SCHEMA}'", lines.get(("schema",), 1))
    if schema > SCHEMA:
        raise Mismatch(f"the zoo's index has schema {schema}, this vtzoo knows up to {SCHEMA}", "pip install -U vtzoo")
    index = Index(catalogue=content.get("catalogue") is True)
    known = ("schema", "catalogue", *SECTIONS)
    for key, table in content.items():
        if key not in known:
            raise _Wrong(f"{shown(key)} is no section ({did_you_mean(key, known)})", lines[key,])
        if key in SECTIONS:
            index.sections[key] = _section(key, table, lines)
    return index


def _section(section: Section, table: Any, lines: Mapping[tuple[str, ...], int]) -> dict[str, Facts]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise _Wrong(f"{section} is no map of names", lines[section,])
    table = cast("dict[str, Any]", table)
    for name, facts in table.items():
        line = lines[section, name]
        if not isinstance(facts, dict):
            raise _Wrong(f"{section} {shown(name)} has no map of facts", line)
        try:
            check_name(name)
            check_facts(section, cast("Facts", facts))
        except UsageError as error:
            raise _Wrong(f"{section} {shown(name)}: {error.message}; {error.hint}", line) from error
    return table


def _check_plain(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # an unencodable text is a ValueError
        raise UsageError(f"a fact is no plain JSON value: {error}", "use text, numbers, lists and maps") from error
    if _depth(value) > _DEPTH_LIMIT:
        raise UsageError(f"a fact is nested more than {_DEPTH_LIMIT} levels deep", "keep facts flat")
    _count(value)


def _check_size(text: str, sections: Sections) -> None:
    """What is written is read again, by those who don't remember it, too."""
    if len(text.encode()) > LIMIT_BYTES or (len(text) > 2 * _VALUE_LIMIT and _count(sections) > _VALUE_LIMIT - 2):
        said = f"the index would have more than {LIMIT_BYTES} bytes or {_VALUE_LIMIT} values"
        raise UsageError(said, "remove entries (vtzoo rm), or begin another zoo: vtzoo init DIR")


def _count(value: Any) -> int:
    """How many values there are, keys among them.

    Raises:
        UsageError: a text is too long.
    """
    if isinstance(value, str) and len(value) > WORD_LIMIT:
        raise UsageError(f"a fact with a text of {len(value)} characters", f"use at most {WORD_LIMIT}")
    if isinstance(value, dict):
        return 1 + sum(_count(k) + _count(v) for k, v in cast("dict[str, Any]", value).items())
    return 1 + (sum(map(_count, cast("list[Any]", value))) if isinstance(value, list) else 0)


def _depth(value: Any) -> int:
    inner = cast("dict[str, Any]", value).values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0

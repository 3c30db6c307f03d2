"""Look a zoo over without changing it, and make its index again when that is lost.

The index is made of what it says, or where it can't be read of its newest copy (`vtzoo.copies`), and of the headers of
deltas that neither names, which have all that an entry needs but the name. Models' files and backbones say too little of
themselves: without a copy they stay loose.
"""

import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtzoo.catalogue import INDEX, Facts, Index, Sections, parse, read
from vtzoo.copies import copies
from vtzoo.errors import Corrupt, NotFound, UsageError, VtzooError
from vtzoo.headers import read_header, stands_on
from vtzoo.leftovers import leftovers
from vtzoo.objects import MODE, held, place
from vtzoo.refs import SECTIONS, Entry, check_facts, check_name, contents_of, objects_of
from vtzoo.results import leading
from vtzoo.zoo import Zoo

_SHOWN = ("method", "tasks")
"""Facts of a delta that every vtzoo has written."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that isn't as it should be: an "error" loses an artifact, a "note" takes only room or order."""

    kind: Literal["error", "note"]
    what: str
    said: str
    hint: str


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """An index that was made again: entries kept, entries found again by source, and those whose objects are lost."""

    kept: int
    found: dict[str, str]
    lost: list[str]
    aside: Path | None


def look(zoo: Zoo) -> list[Finding]:
    """Everything that is wrong, errors first; no object is hashed (`vtzoo verify` does that).

    Raises:
        NotFound: there is no zoo here, nor what is left of one.
    """
    try:
        entries = [e for s, table in zoo.index().items() for e in (Entry(s, n, f) for n, f in table.items())]
    except (Corrupt, NotFound) as error:
        if isinstance(error, NotFound) and not (zoo.root / ".vtzoo").is_dir():
            raise
        return [Finding("error", "index", str(error), f"vtzoo fsck --rebuild, {_told(zoo)}")]
    found = [finding for entry in entries for finding in _of_entry(zoo, entry)]
    found += list(_of_folder(zoo))
    return sorted(found, key=lambda f: (f.kind, f.what))


def rebuild(zoo: Zoo) -> Rebuilt:
    """Make the index again of all that is whole, while nobody else writes it; the old one is put aside.

    Raises:
        NotFound: there is no zoo here, nor what is left of one.
        Mismatch: a newer vtzoo wrote the index or its copy.
        UsageError: it is the built-in catalogue.
    """
    if not (zoo.root / ".vtzoo").is_dir():
        zoo.index()
    sections, lost, found = Index().sections, list[str](), dict[str, str]()

    def make() -> Sections:
        entries, source = _listed(zoo)
        for entry in entries:
            _keep(zoo, sections, entry, lost)
        if source:
            found.update((name, source) for table in sections.values() for name in table)
        for entry in _headers(zoo, sections):
            _keep(zoo, sections, entry, lost)
            found[entry.name] = "header"
        return sections

    aside = zoo.replace_index(make)
    count = sum(len(table) for table in sections.values())
    return Rebuilt(count - len(found), found, sorted(lost), aside)


def _of_entry(zoo: Zoo, entry: Entry) -> Iterator[Finding]:
    again = "make or pull it again, or: vtzoo rm " + entry.name
    sizes: dict[str, int] = {}
    for digest in sorted(entry.objects):
        path = place(zoo.root, digest)
        try:
            facts = path.lstat()
        except OSError:
            yield Finding("error", entry.name, f"its object {digest[:12]}… is missing", again)
            return
        if not stat.S_ISREG(facts.st_mode):
            yield Finding("error", entry.name, f"its object {digest[:12]}… is no ordinary file", again)
            return
        if stat.S_IMODE(facts.st_mode) & 0o222:
            yield Finding("note", entry.name, f"its object {digest[:12]}… can be written", f"chmod {MODE:o} {path}")
        sizes[digest] = facts.st_size
    wanted, seen = entry.facts.get("size_bytes"), sum(sizes[digest] for digest in contents_of(entry))
    if entry.objects and wanted is not None and seen != wanted:
        yield Finding("error", entry.name, f"it has {seen} bytes, and {wanted} are said to be there", again)
    elif entry.section == "deltas":
        yield from _of_delta(zoo, entry, again)


def _of_delta(zoo: Zoo, entry: Entry, again: str) -> Iterator[Finding]:
    path = place(zoo.root, entry.digest)
    try:
        _facts(path)
    except VtzooError as error:
        yield Finding("error", entry.name, str(error), again)
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("error", entry.name, f"its object {entry.digest[:12]}… is no delta", again)
        return
    if lacking := [fact for fact in _SHOWN if fact not in entry.facts]:  # lines that a merge of two indexes lost
        said = f"the index lacks its {' and '.join(lacking)}, its file has that"
        yield Finding("note", entry.name, said, "vtzoo fsck --rebuild")
    _, mark, weights = stands_on(path).partition("object:sha256:")
    if mark and not place(zoo.root, weights).is_file():
        said = f"the weights {weights[:12]}… of the backbone that it stands on are not here"
        yield Finding("note", entry.name, said, "add or pull the backbone before it is used")


def _of_folder(zoo: Zoo) -> Iterator[Finding]:
    for kind, what in (
        ("loose", "objects that no entry refers to"),
        ("halves", "files that a program left half-written"),
    ):
        found = [f for f in leftovers(zoo) if f.kind == kind]
        if found:
            size_mb = sum(f.size_bytes for f in found) / 1e6
            yield Finding("note", kind, f"{len(found)} {what}, {size_mb:.1f} MB", "vtzoo gc, or vtzoo fsck --rebuild")
    strange = _strangers(zoo)
    if strange:
        yield Finding(
            "note", "strangers", f"{len(strange)} files that are no objects: {strange[0]}", "move them elsewhere"
        )


def _strangers(zoo: Zoo) -> list[str]:
    shelf = zoo.root / ".vtzoo" / "objects"
    known = {place(zoo.root, digest) for digest, _ in held(zoo.root)}
    return (
        sorted(str(p.relative_to(zoo.root)) for p in shelf.rglob("*") if not p.is_dir() and p not in known)
        if shelf.is_dir()
        else []
    )


def _told(zoo: Zoo) -> str:
    entries, source = _listed(zoo)
    return f"which has a copy with {len(entries)} entries" if source else "which reads what deltas say of themselves"


def _listed(zoo: Zoo) -> tuple[list[Entry], str]:
    """The entries of the index, else of its newest copy that can be read, and which copy; none at all else."""
    for path in (zoo.root / INDEX, *copies(zoo.root)):
        with suppress(Corrupt, NotFound):
            sections = parse(read(path), path).sections
            source = "" if path.name == INDEX else f"{path.stem} copy"
            return [Entry(s, n, f) for s in SECTIONS for n, f in sections[s].items()], source
    return [], ""


def _keep(zoo: Zoo, sections: Sections, entry: Entry, lost: list[str]) -> None:
    """Take an entry whose objects are there, and of a delta what the index lacks from its file."""
    if all(place(zoo.root, digest).is_file() for digest in entry.objects):
        told: Facts = {}
        if entry.section == "deltas":
            with suppress(VtzooError, ValueError, KeyError, TypeError, AttributeError):
                told = _facts(place(zoo.root, entry.digest))
        sections[entry.section][entry.name] = {**told, **entry.facts}
    else:
        lost.append(entry.name)


def _headers(zoo: Zoo, sections: Sections) -> Iterator[Entry]:
    """Deltas that no entry refers to, under names made of their tasks and digests."""
    kept = {d for s, table in sections.items() for facts in table.values() for d in objects_of(s, facts)}
    for digest, _ in held(zoo.root):
        if digest not in kept:
            with suppress(VtzooError, ValueError, KeyError, TypeError, AttributeError):
                facts: Facts = {"digest": digest, **_facts(place(zoo.root, digest))}
                check_facts("deltas", facts)
                yield Entry("deltas", _name(facts["tasks"], digest), facts)


def _name(tasks: list[str], digest: str) -> str:
    with suppress(UsageError):
        return check_name(f"recovered/{tasks[0] if len(tasks) == 1 else 'merge'}-{digest[:12]}")
    return f"recovered/{digest[:12]}"


def _facts(path: Path) -> Facts:
    """The index's facts of a delta, by its own header.

    Raises:
        Corrupt: the file is damaged, or no delta.
        Mismatch: written by a newer vtzoo.
        KeyError, TypeError, AttributeError: it lacks what a delta says.
    """
    said = read_header(path)
    metrics = said.get("metrics") or {}
    return {
        "size_bytes": path.stat().st_size,
        "method": said["method"],
        "backbone": said["backbone"]["name"],
        "fingerprint": said["backbone"]["fingerprint"],
        "tasks": [task["name"] for task in said["tasks"]],
        "metrics": leading(metrics.get("test") or metrics.get("val") or {}),
    }

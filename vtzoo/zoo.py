"""The zoo: a folder with `zoo_index.yaml` and content-addressed objects, the built-in catalogue underneath.

Objects come first and the index last, so an entry never names what is not there. An index is changed by the one who
made the file `.vtzoo/writer` (made only if it isn't there, which network file systems keep to where their `flock` says
yes to everyone), and is read again at the last moment before it is replaced, for those who write without asking.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from vtzoo.catalogue import INDEX, WORD_LIMIT, Index, Sections, builtin, check, dump, is_catalogue, parse, read
from vtzoo.copies import copies, keep_copies, put_aside
from vtzoo.errors import SHOWN, Conflict, Corrupt, NotFound, UsageError, VtzooError
from vtzoo.files import atomic_write
from vtzoo.headers import stands_on
from vtzoo.objects import adopt, contained, drop, place, store
from vtzoo.refs import Entry, Section, check_facts, check_name, check_section, expanded, objects_of, resolve
from vtzoo.spec import plain
from vtzoo.writer import writer

T = TypeVar("T")
ENVIRONMENT = "VTZOO_ZOO"
_TRIES = 8


class Zoo:
    """One zoo; nothing is read before it is asked for.

    Args:
        root: its folder.
        create: make the folder and its index at the first write, if they are missing; else that is NotFound.
        lock_timeout_s: how long to wait for another writer.

    Attributes:
        command: the line that was typed, kept with every entry made through this object, unless it is very long.
    """

    def __init__(self, root: str | Path, *, create: bool = False, lock_timeout_s: float = 30.0) -> None:
        self.root = expanded(root).absolute()
        self._create = create
        self.command = ""
        self._lock_timeout_s = lock_timeout_s
        self._fresh: dict[str, int] = {}  # digests stored here, with when

    def __repr__(self) -> str:
        return f"Zoo({str(self.root)!r})"

    @classmethod
    def find(cls, path: str | Path | None = None) -> Self:
        """Find the zoo to use: `path`, else $VTZOO_ZOO, else the nearest folder upward, else the user's data folder.

        The last resort and $VTZOO_ZOO are made at the first write; a `path` must be a zoo already.

        Raises:
            NotFound: `path` is no zoo.
        """
        if path is not None:
            zoo = cls(path)
            check(zoo.index_bytes() or b"", zoo._index_path)
            return zoo
        if named := os.environ.get(ENVIRONMENT):
            return cls(named, create=True)
        nearest = _upward()
        if nearest is not None:
            return cls(nearest)
        from platformdirs import user_data_path

        return cls(user_data_path("vtzoo", appauthor=False), create=True)

    @classmethod
    def init(cls, path: str | Path, *, exist_ok: bool = False) -> Self:
        """Make a new, empty zoo (and its folder).

        Raises:
            Conflict: one is there already, unless `exist_ok`.
        """
        zoo = cls(path, create=True)
        if not zoo._index_path.exists():
            zoo._change(lambda _: (None, ()))
        elif not exist_ok:
            raise Conflict(f"{zoo.root} is a zoo already", f"use it with: --zoo {zoo.root}")
        return zoo

    @property
    def _index_path(self) -> Path:
        return self.root / INDEX

    # ------------------------------------------------------------------------------------------------------- reading
    def index(self) -> Sections:
        """Read the zoo's own entries: section, name, facts.

        Raises:
            NotFound: there is no zoo here.
            Corrupt: the index is damaged; the message has the line.
        """
        return self._parsed(self.index_bytes()).sections

    def index_bytes(self) -> bytes | None:
        """The index file's content; None when it is still to be made.

        Raises:
            NotFound: there is no zoo here.
            Corrupt: there was one, and its index is gone.
        """
        try:
            return read(self._index_path)
        except NotFound as error:
            if there := copies(self.root):
                raise Corrupt(
                    f"{self.root} has lost its {INDEX} ({there[0].name} is a copy)", "vtzoo fsck --rebuild"
                ) from error
            if self._create:
                return None
            raise NotFound(f"{self.root} has no {INDEX}", f"make it a zoo: vtzoo init {self.root}") from error

    def entries(self, section: Section | None = None) -> list[Entry]:
        """List the entries by section and name; an own one hides the catalogue's of that name."""
        index = self._parsed(self.index_bytes())
        own = _own(index.sections, builtin=index.catalogue)
        by_key = {(e.section, e.name): e for e in [*builtin(), *own]}
        wanted = None if section is None else check_section(section)
        return [by_key[key] for key in sorted(by_key) if wanted in (None, key[0])]

    def resolve(self, ref: str, section: Section | None = None) -> Entry:
        """Find the entry that a ref means: the exact name, name@sha256:ab12, or a unique prefix.

        Raises:
            NotFound: none; the hint suggests the nearest.
            UsageError: several (the message lists them), or the ref is a path.
        """
        return resolve(ref, self.entries(), section)

    def object(self, digest: str) -> Path:
        """The file with this sha256.

        Raises:
            UsageError: not 64 hex digits.
            NotFound: this zoo does not hold it.
        """
        path = contained(self.root, digest)
        if not path.is_file():
            raise NotFound(f"object {digest[:12]}… is missing in {self.root}", "add or make it again")
        return path

    def check_free(self, section: Section, name: str) -> None:
        """Refuse early what `put` would refuse after the work is done.

        Raises:
            UsageError: the name is not legal, or this is the built-in catalogue.
            Conflict: the name is taken.
        """
        index = self._parsed(self.index_bytes())
        self._refuse_catalogue(index)
        self._check_new(index.sections, check_section(section), check_name(name), replace=False)

    # ------------------------------------------------------------------------------------------------------- writing
    def add_object(self, source: str | Path | bytes) -> str:
        """Store a file or bytes under their sha256, read-only; the same content again changes nothing.

        Raises:
            NotFound: no such file.
            Conflict: the file changed while it was read.
            Resources: the disk is full.
        """
        self._refuse_catalogue(self._parsed(self.index_bytes()))
        digest, new = store(self.root, source)
        if new:
            self._fresh[digest] = _stored_at(self.root, digest)
        return digest

    def adopt(self, source: Path, digest: str) -> None:
        """Move a file that was written and synced on the zoo's own disk to its place under its sha256, read-only."""
        adopt(self.root, source, digest)
        self._fresh[digest] = _stored_at(self.root, digest)

    def discard(self, digests: Iterable[str]) -> None:
        """Take back objects that this `Zoo` has just stored and that no entry refers to (when a job fails half-way).

        What someone else has stored since, too, stays; and so does everything while another program writes the index
        (`vtzoo gc` sweeps it up).
        """
        mine = {d: self._fresh.pop(d) for d in set(digests) & set(self._fresh)}
        if mine:
            with suppress(VtzooError), self._locked(wait_s=0):
                self._drop((d for d, when in mine.items() if _stored_at(self.root, d) == when), self.index())

    def put(self, section: Section, name: str, facts: Mapping[str, Any], *, replace: bool | Entry = False) -> Entry:
        """Publish an entry, with the time and the command that made it; its objects must be stored already.

        When this fails, objects that this `Zoo` stored for it are removed again. When it replaces an entry
        (any of that name, or only one that still is as it was read), objects that nothing refers to any more are removed.

        Raises:
            UsageError: the name or a fact is not legal, or this is the built-in catalogue.
            Conflict: the name exists (and not `replace`), the entry is another now, or the lock is held too long.
            NotFound: an object is missing, or the entry to be replaced.
        """
        made = {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        made |= {"command": self.command} if 0 < len(self.command) <= WORD_LIMIT else {}
        entry = Entry(check_section(section), name, plain({**made, **facts}))
        check_facts(section, entry.facts)
        try:
            self._change(lambda sections: self._put(sections, entry, replace=replace))
        except BaseException:
            self.discard(entry.objects)
            raise
        for digest in entry.objects:
            self._fresh.pop(digest, None)
        return entry

    def remove(self, entry: Entry, *, force: bool = False) -> None:
        """Remove an entry, and its objects that no other entry refers to.

        Args:
            entry: as it was read.
            force: also a backbone whose weights deltas here need: they won't run any more.

        Raises:
            UsageError: it belongs to the built-in catalogue.
            NotFound: it is gone already.
            Conflict: it was changed meanwhile, or deltas need its weights.
        """

        def change(sections: Sections) -> tuple[None, Iterable[str]]:
            self._check_same(sections, entry)
            del sections[entry.section][entry.name]
            if not force and (needed := self._dependants(entry, sections)):
                listed = ", ".join(needed[:SHOWN]) + (f" and {len(needed) - SHOWN} more" if needed[SHOWN:] else "")
                raise Conflict(f"'{entry.name}' holds the weights of {listed}", f"vtzoo rm {entry.name} --force")
            return None, entry.objects

        self._change(change)

    def rename(self, entry: Entry, new: str) -> Entry:
        """Give an entry another name.

        Raises:
            UsageError: the name is not legal, or the entry belongs to the built-in catalogue.
            NotFound: the entry is gone.
            Conflict: the new name exists, or the entry was changed meanwhile.
        """

        def change(sections: Sections) -> tuple[Entry, Iterable[str]]:
            self._check_same(sections, entry)
            self._check_new(sections, entry.section, check_name(new), replace=False)
            sections[entry.section][new] = sections[entry.section].pop(entry.name)
            return Entry(entry.section, new, entry.facts), ()

        return self._change(change)

    def sweep(self, digests: Iterable[str], grace_s: float) -> set[str]:
        """Delete those of these objects that no entry refers to and nobody has stored for this long; gives which."""
        with self._locked():
            kept = {digest for entry in _own(self.index()) for digest in entry.objects}
            now, grace_ns = time.time_ns(), int(grace_s * 1e9)
            gone = {d for d in set(digests) - kept if max(now - _stored_at(self.root, d), 0) >= grace_ns}
            drop(self.root, gone)
        return gone

    def replace_index(self, make: Callable[[], Sections]) -> Path | None:
        """Put entries, made under the lock, in the index's place, whatever stands there; gives where that was put aside.

        Raises:
            UsageError: it is a link, which may lead anywhere, or the built-in catalogue.
        """
        with self._locked():
            path = self._index_path
            if path.is_symlink():
                raise UsageError(f"{path} is a link to {path.readlink()}", "put the file itself there")
            self._refuse_catalogue(Index(catalogue=path.exists() and is_catalogue(path)))
            data = dump(Index(make())).encode()
            aside = put_aside(path) if path.exists() else None
            with atomic_write(path) as file:
                file.write(data)
            keep_copies(self.root, None, data)
        return aside

    # -------------------------------------------------------------------------------------------------------- inside
    def _parsed(self, data: bytes | None) -> Index:
        return Index() if data is None else parse(data, self._index_path)

    def _refuse_catalogue(self, index: Index) -> None:
        if index.catalogue:
            raise UsageError(f"{self.root} is a catalogue: nothing is written there", "make a zoo: vtzoo init DIR")

    def _check_new(self, sections: Sections, section: Section, name: str, *, replace: bool) -> None:
        """A name is free when no section has it; over the catalogue's of the same section it may be put."""
        for entry in [*builtin(), *_own(sections)]:
            if entry.name != name or (entry.section == section and (replace or entry.builtin)):
                continue
            if entry.builtin:
                raise Conflict(f"'{name}' is one of the catalogue's {entry.section}", "choose another name")
            raise Conflict(f"'{name}' exists already ({entry.section})", f"choose another name, or: vtzoo rm {name}")

    def _check_same(self, sections: Sections, entry: Entry) -> None:
        if entry.builtin:
            raise UsageError(f"'{entry.name}' belongs to the built-in catalogue: it stays as it is", "see: vtzoo ls")
        facts = sections[entry.section].get(entry.name)
        if facts is None:
            raise NotFound(f"'{entry.name}' is gone from {self.root}", "see the names with: vtzoo ls")
        if json.dumps(facts, sort_keys=True) != json.dumps(plain(entry.facts), sort_keys=True):
            raise Conflict(f"'{entry.name}' was changed by someone else meanwhile", "look at it again: vtzoo show")

    def _dependants(self, entry: Entry, sections: Sections) -> list[str]:
        """The deltas that say they stand on a backbone's object, if no other entry would keep that."""
        if entry.section != "backbones":
            return []
        kept = {digest for other in _own(sections) for digest in other.objects}
        lost = {f"object:sha256:{digest}" for digest in entry.objects - kept}
        deltas = sections["deltas"].items() if lost else ()
        return sorted(n for n, facts in deltas if stands_on(place(self.root, facts["digest"])) in lost)

    def _put(self, sections: Sections, entry: Entry, *, replace: bool | Entry) -> tuple[None, Iterable[str]]:
        if isinstance(replace, Entry):
            self._check_same(sections, replace)
        self._check_new(sections, entry.section, check_name(entry.name), replace=bool(replace))
        for digest in entry.objects:
            self.object(digest)
        old = sections[entry.section].get(entry.name, {})
        sections[entry.section][entry.name] = entry.facts
        return None, objects_of(entry.section, old)

    def _change(self, change: Callable[[Sections], tuple[T, Iterable[str]]]) -> T:
        """Change the index under the lock; `change` also names the objects that may have lost their last reference."""
        self._refuse_catalogue(self._parsed(self.index_bytes()))
        with self._locked():
            for _ in range(_TRIES):
                before = self.index_bytes()
                index = self._parsed(before)
                self._refuse_catalogue(index)
                result, loose = change(index.sections)
                if self._replace(before, dump(index, before or b"")):
                    self._drop(loose, index.sections)
                    return result
        raise Conflict(f"the index of {self.root} keeps changing", "stop the program that writes it without the lock")

    def _replace(self, before: bytes | None, text: str) -> bool:
        """Write the index unless someone changed it since; say whether it was written."""

        def guard() -> None:
            if self.index_bytes() != before:
                raise _Moved

        try:
            with atomic_write(self._index_path, guard=guard) as file:
                file.write(text.encode())
        except _Moved:
            return False
        keep_copies(self.root, before, text.encode())
        return True

    def _locked(self, wait_s: float | None = None) -> AbstractContextManager[None]:
        return writer(self.root, self._lock_timeout_s if wait_s is None else wait_s)

    def _drop(self, digests: Iterable[str], sections: Sections) -> None:
        """Delete objects that no entry refers to."""
        kept = {digest for entry in _own(sections) for digest in entry.objects}
        drop(self.root, set(digests) - kept)


class _Moved(Exception):
    """The index changed between reading and replacing it."""


def _stored_at(root: Path, digest: str) -> int:
    """When an object was last stored, in ns; 0 where it is gone."""
    with suppress(OSError):
        return place(root, digest).stat().st_mtime_ns
    return 0


def _own(sections: Sections, *, builtin: bool = False) -> list[Entry]:
    return [Entry(s, name, facts, builtin=builtin) for s, table in sections.items() for name, facts in table.items()]


def _upward() -> Path | None:
    """The nearest folder from the current one upward that holds a zoo; catalogues are passed by."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return None
    for folder in (here, *here.parents):
        index = folder / INDEX
        if index.is_file() and not is_catalogue(index):
            return folder
    return None

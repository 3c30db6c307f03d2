"""A zoo for a while: some entries of another one, by links to its objects, and whatever is made beside them."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from vtzoo.errors import VtzooError
from vtzoo.headers import stands_on
from vtzoo.refs import Entry
from vtzoo.zoo import Zoo

_OBJECT = "object:sha256:"


@contextmanager
def scratch(zoo: Zoo, entries: Iterable[Entry]) -> Generator[Zoo, None, None]:
    """A zoo with these entries of another, on its disk where that can be written, and gone afterwards.

    Raises:
        NotFound: an entry's object is missing.
    """
    home = zoo.root / ".vtzoo"
    writable = home.is_dir() and os.access(home, os.W_OK)
    mark = f".{secrets.token_hex(8)}.tmp"  # by which what a killed program leaves is known
    with tempfile.TemporaryDirectory(mark, ".scratch.", home if writable else None) as folder:
        other = Zoo.init(Path(folder))
        lent = list(entries)
        for digest in sorted({d for entry in lent for d in (*entry.objects, *_beneath(zoo, entry))}):
            _lend(zoo.object(digest), other, digest)
        for entry in lent:
            other.put(entry.section, entry.name, entry.facts)
        yield other


def _beneath(zoo: Zoo, entry: Entry) -> set[str]:
    """The object of the backbone that a delta stands on, where that is one and is here."""
    if entry.section != "deltas":
        return set()
    with suppress(VtzooError):
        source = stands_on(zoo.object(entry.digest))
        if source.startswith(_OBJECT):
            zoo.object(source.removeprefix(_OBJECT))
            return {source.removeprefix(_OBJECT)}
    return set()


def _lend(path: Path, other: Zoo, digest: str) -> None:
    """Link an object, or copy it where links don't reach."""
    place = other.root / f"{digest}.lent"
    if not _linked(path, place):
        shutil.copyfile(path, place)
    other.adopt(place, digest)


def _linked(path: Path, place: Path) -> bool:
    if os.name == "nt":  # where removing a read-only file makes it writable first, under all of its names
        return False
    try:
        os.link(path, place)
    except OSError:
        return False
    return True

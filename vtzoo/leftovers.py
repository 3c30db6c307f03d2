"""What lies in a zoo's folder: what entries keep, what can be made again, and what nobody refers to.

    loose     objects of no entry
    halves    files and folders that a killed program was writing, or that came and were not what they should be
    answers   teachers' answers and features, made again when they are asked for
    runs      checkpoints and logs of training

The first two are swept up after a time of grace, in which whoever wrote them may still be about to publish them.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtzoo.files import writing
from vtzoo.objects import hall, held, place
from vtzoo.quarantine import FOLDER
from vtzoo.refs import Entry
from vtzoo.zoo import Zoo

Kind = Literal["loose", "halves", "answers", "runs"]
SWEPT: tuple[Kind, ...] = ("loose", "halves")
GRACE_S = 24 * 3600.0
_HALF = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")
_PLACES: dict[str, Kind] = {"cache": "answers", "checkpoints": "runs", "logs": "runs"}


@dataclass(frozen=True, slots=True)
class Leftover:
    """One file or folder that no entry keeps; `age_s` since it was last written (0 of what a wrong clock dated later)."""

    kind: Kind
    path: Path
    size_bytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """What an entry takes: bytes of its objects, and how many of them would be free without it."""

    entry: Entry
    size_bytes: int
    alone_bytes: int


def leftovers(zoo: Zoo, kinds: Iterable[Kind] = SWEPT) -> list[Leftover]:
    """Find what no entry keeps, the largest first."""
    now, wanted = time.time(), set(kinds)
    found = [*_loose(zoo, now), *_halves(zoo, now)]
    found += [_whole(kind, zoo.root / ".vtzoo" / name, now) for name, kind in _PLACES.items()]
    return sorted((f for f in found if f.kind in wanted and f.size_bytes >= 0), key=lambda f: -f.size_bytes)


def collect(
    zoo: Zoo, kinds: Iterable[Kind] = SWEPT, *, grace_s: float = GRACE_S, dry_run: bool = False
) -> list[Leftover]:
    """Delete what no entry keeps and nobody has written for a while; gives what went (or would go).

    Objects go under the index's lock, and only if still no entry refers to them.

    Raises:
        Conflict: another program writes the index.
        Corrupt: the index is damaged: what it keeps isn't known.
    """
    old = [f for f in leftovers(zoo, kinds) if f.age_s >= grace_s]
    if dry_run:
        return old
    gone = zoo.sweep((f.path.name for f in old if f.kind == "loose"), grace_s)
    for found in old:
        if found.kind != "loose":
            _remove(found.path)
    return [f for f in old if f.kind != "loose" or f.path.name in gone]


def _remove(path: Path) -> None:
    with writing(path), suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def shares(zoo: Zoo) -> list[Share]:
    """What each of a zoo's own entries takes, the largest first."""
    sizes = {digest: facts.st_size for digest, facts in held(zoo.root)}
    own = [entry for entry in zoo.entries() if not entry.builtin]
    users: dict[str, int] = {}
    for entry in own:
        for digest in entry.objects:
            users[digest] = users.get(digest, 0) + 1
    found = [
        Share(e, sum(sizes.get(d, 0) for d in e.objects), sum(sizes.get(d, 0) for d in e.objects if users[d] == 1))
        for e in own
    ]
    return sorted(found, key=lambda share: (-share.size_bytes, share.entry.name))


def _loose(zoo: Zoo, now: float) -> list[Leftover]:
    kept = {digest for entry in zoo.entries() if not entry.builtin for digest in entry.objects}
    return [
        Leftover("loose", place(zoo.root, digest), facts.st_size, max(now - facts.st_mtime, 0.0))
        for digest, facts in held(zoo.root)
        if digest not in kept
    ]


def _halves(zoo: Zoo, now: float) -> list[Leftover]:
    places, found = {hall(zoo.root), zoo.root / FOLDER}, [p for p in zoo.root.glob(".*.tmp") if _HALF.fullmatch(p.name)]
    for folder, folders, names in os.walk(zoo.root / ".vtzoo"):
        halves = {n for n in [*folders, *names] if Path(folder) in places or _HALF.fullmatch(n)}
        folders[:] = [n for n in folders if n not in halves]
        found += [Path(folder, name) for name in sorted(halves)]
    return [_whole("halves", path, now) for path in found]


def _whole(kind: Kind, path: Path, now: float) -> Leftover:
    """A file, or a folder with all that is in it; a size below zero where it isn't there."""
    sizes, newest = [], 0.0
    for file in [path, *(Path(f, n) for f, _, names in os.walk(path) for n in names)]:
        try:
            facts = file.lstat()
        except FileNotFoundError:
            continue
        newest = max(newest, facts.st_mtime)
        if not file.is_dir():
            sizes.append(facts.st_size)
    return Leftover(kind, path, sum(sizes) if sizes else -1, max(now - newest, 0.0))

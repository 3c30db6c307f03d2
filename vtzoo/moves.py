"""What has to move so that one zoo has what another has; nothing moves yet.

Two entries are the same when their content is: the digests of their files, or the source of a backbone that has none.
A delta brings the backbone that it stands on, if that is one of weights added from a file; of one of the Hugging Face Hub it
brings what the entry says.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from vtzoo import signing, strict
from vtzoo.catalogue import Index
from vtzoo.errors import SHOWN, Conflict, Corrupt, NotFound, UsageError
from vtzoo.headers import source_in
from vtzoo.patience import patiently
from vtzoo.refs import SECTIONS, Entry, check_name, shown, signature_object
from vtzoo.remotes import Remote
from vtzoo.remotes.folder import Folder
from vtzoo.talk import say
from vtzoo.transfer import announced


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """An entry on its way.

    Attributes:
        entry: as it is where it comes from.
        new: as it is to be where it goes.
        action: `push`, `pull`, `none` (up to date) or `conflict` (the name is taken by other content).
        sizes: bytes of the objects that the other side lacks, by digest.
        along: whether nobody named it: a backbone that a delta brings.
    """

    entry: Entry
    new: Entry
    action: str
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    along: bool = False


def planned(
    source: Remote,
    target: Remote,
    chosen: Iterable[Entry],
    *,
    action: str,
    name: str | None = None,
    force: bool = False,
    backbone: bool = True,
) -> list[Move]:
    """What becomes of each entry, backbones before the deltas that stand on them.

    `force` is for what was named: a backbone that comes along never takes the place of one that others stand on.

    Raises:
        UsageError: one is the catalogue's, or a name is for several.
        Corrupt: an object is announced larger than its index says, or a backbone's weights are a package's.
    """
    entries = list({(e.section, e.name): e for e in chosen}.values())
    if name is not None and len(entries) != 1:
        raise UsageError(f"--as gives one entry a name, not {len(entries)}", "name one entry")
    if mine := [e.name for e in entries if e.builtin]:
        raise UsageError(
            f"'{mine[0]}' belongs to the built-in catalogue, which every zoo has", "name an entry of your own"
        )
    for entry in entries:
        _check_source(entry, source)
    there = patiently(target.index)[0]
    if there.catalogue:
        raise UsageError(f"{target.where} is a catalogue: nothing is written there", "push to a zoo")
    more = [e for e in _backbones(source, entries) if not _stands(there, e)] if backbone else []
    more = [
        e for e in more if e.objects or verdict(there, e, e.name, force=False) != "conflict"
    ]  # the hub has its weights
    moves = [Move(entry=e, new=e, action=verdict(there, e, e.name, force=False), along=True) for e in more]
    for e, n in [(e, check_name(name or e.name)) for e in entries]:
        moves.append(Move(entry=e, new=Entry(e.section, n, e.facts), action=verdict(there, e, n, force=force)))
    return [_sized(source, target, move, action) for move in moves]


def refuse_conflicts(moves: Sequence[Move], where: str) -> None:
    """Refuse when a name is taken.

    Raises:
        Conflict: lists them.
    """
    clashing = [m for m in moves if m.action == "conflict"]
    if clashing:
        taken = [f"'{m.new.name}'" for m in clashing]
        listed = ", ".join(taken[:SHOWN]) + (f" and {len(taken) - SHOWN} more" if taken[SHOWN:] else "")
        hint = "give it another name with --as NAME, or replace it with --force"
        if along := [m.new.name for m in clashing if m.along]:
            hint = f"bring the backbone {along[0]} by itself first, with --as NAME, or leave it out with --no-backbone"
        raise Conflict(f"in {where} other content has the name {listed}", hint)


def verdict(there: Index, entry: Entry, name: str, *, force: bool) -> str:
    """`none` where the same content has the name already, `conflict` where other content has it, else nothing.

    Of the same content a signature that is lacking there is still to be brought, and with `force` facts that differ.
    """
    for section in SECTIONS:
        facts = there.sections[section].get(name)
        if facts is None:
            continue
        if section == entry.section and _content(facts) == _content(entry.facts):
            same = signing.statement(Entry(section, name, facts)) == signing.statement(entry)
            signs = bool(entry.facts.get("signature")) and facts.get("signature") != entry.facts["signature"]
            return "" if (signs and same and not facts.get("signature")) or (force and (signs or not same)) else "none"
        if section != entry.section or not force:
            return "conflict"
    return ""


def most_bytes(entry: Entry, digest: str) -> int | None:
    """What an object of an entry may have, by its index; None where that doesn't say."""
    return signing.LIMIT_BYTES if digest == signature_object(entry.facts) else entry.facts.get("size_bytes")


def entries_of(index: Index) -> list[Entry]:
    """The entries of an index by section and name."""
    return [Entry(s, name, facts) for s, table in index.sections.items() for name, facts in sorted(table.items())]


def _sized(source: Remote, target: Remote, move: Move, action: str) -> Move:
    """A move with the sizes of what is lacking; a folder may lack a file of an entry that it lists."""
    listed = move.action == "none"
    if move.action == "conflict" or (listed and not isinstance(target, Folder)):
        return move
    sizes: dict[str, int] = {}
    for digest in sorted(move.entry.objects):
        held = _size(target, digest)
        if listed and held is not None:
            continue
        size = announced(source, digest, most_bytes(move.entry, digest))
        if held != size:
            sizes[digest] = size
    return replace(move, action=action if sizes or not listed else "none", sizes=sizes)


def _check_source(entry: Entry, source: Remote) -> None:
    """Refuse weights that the other side can't know: those of a package of whoever reads the entry.

    Raises:
        Corrupt: a backbone says so.
    """
    if entry.section == "backbones" and not str(entry.facts["source"]).startswith(("object:", "hf-hub:")):
        raise Corrupt(
            f"'{entry.name}' of {source.where} has the source {shown(entry.facts['source'])}, which does not travel",
            "add the backbone from a file: vtzoo add backbone",
        )


def _size(target: Remote, digest: str) -> int | None:
    with suppress(NotFound):
        return patiently(lambda: target.size(digest))
    return None


def _content(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("digest", "files", "source") if facts.get(key)}


def _backbones(source: Remote, entries: Sequence[Entry]) -> list[Entry]:
    """The backbones that deltas among these stand on, as far as the source has them; those that are named already left out."""
    kinds = ("object:", "hf-hub:")
    wanted = {s for e in entries if e.section == "deltas" and (s := _stands_on(source, e)).startswith(kinds)}
    if not wanted:
        return []
    every = entries_of(patiently(source.index)[0])
    found = {e.facts["source"]: e for e in reversed(every) if e.section == "backbones" and e.facts["source"] in wanted}
    for missing in sorted(s for s in wanted - set(found) if s.startswith("object:")):
        say(f"the backbone {missing[:26]}… is not in {source.where}: what stands on it won't run without")
    return [found[s] for s in sorted(found) if found[s] not in entries]


def _stands_on(source: Remote, entry: Entry) -> str:
    """The source of a delta's backbone, from the head of its file; empty where that can't be read."""
    try:
        length = int.from_bytes(_read(source, entry.digest, 0, 8), "little")
        table = strict.record(_read(source, entry.digest, 8, 8 + length)) if length <= strict.LIMIT_BYTES else {}
    except ValueError:
        return ""
    return source_in(table.get("__metadata__"))


def _read(source: Remote, digest: str, start: int, end: int) -> bytes:
    return patiently(lambda: b"".join(source.stream(digest, start, end)))


def _stands(there: Index, backbone: Entry) -> bool:
    return any(facts.get("source") == backbone.facts["source"] for facts in there.sections["backbones"].values())

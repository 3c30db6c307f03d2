"""Entries between a zoo and one elsewhere: objects first, the index last; facts travel as they are."""

import time
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from vtzoo import patience, signing
from vtzoo.catalogue import INDEX
from vtzoo.errors import Conflict, Corrupt, NotFound, UsageError
from vtzoo.files import sha256
from vtzoo.moves import Move, entries_of, most_bytes, planned, refuse_conflicts, verdict
from vtzoo.patience import patiently
from vtzoo.refs import Entry, Section, resolve, signature_object
from vtzoo.remotes import Remote, open_remote
from vtzoo.remotes.folder import Folder
from vtzoo.talk import say
from vtzoo.transfer import fetch
from vtzoo.zoo import Zoo

_SWAPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One entry and what became of it: `push`, `pull`, `none` or `conflict`; `size_bytes` of what the other side lacked."""

    ref: str
    section: Section
    action: str
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a push, pull or sync did, or would do (`dry_run`): `moved_bytes` of objects over the wire, in `seconds`."""

    remote: str
    entries: list[Item]
    dry_run: bool = False
    moved_bytes: int = 0
    seconds: float = 0.0


def push(
    refs: Sequence[str],
    remote: str,
    *,
    zoo: Zoo | None = None,
    name: str | None = None,
    force: bool = False,
    backbone: bool = True,
    dry_run: bool = False,
) -> Shared:
    """Bring entries of a zoo to a remote.

    Args:
        refs: which.
        remote: its URL or path.
        zoo: where from; by default the one that `Zoo.find` finds.
        name: what to call it there, of one ref.
        force: take names that other content has there.
        backbone: with a delta also the backbone that it stands on.
        dry_run: only say what would move.

    Raises:
        Conflict: a name is taken there by other content.
        UsageError: the remote can only be read, or an entry is the catalogue's.
        Network: it can't be reached.
    """
    zoo = zoo or Zoo.find()
    if not Path(remote).exists() and any(remote == entry.name for entry in zoo.entries()):
        raise UsageError(f"'{remote}' is an entry, a remote is wanted", f"name one after it, or a folder as ./{remote}")
    there, began = open_remote(remote), time.monotonic()
    if there.read_only:
        raise UsageError(f"{there.where} can only be read", "push to a folder, ssh://, s3://, gs:// or hf://")
    chosen = [zoo.resolve(ref) for ref in refs]
    moves = planned(Folder(zoo), there, chosen, name=name, force=force, backbone=backbone, action="push")
    refuse_conflicts(moves, there.where)
    moved = 0 if dry_run else _push(zoo, there, moves, force=force)
    return _shared(there, moves, moved, began, dry_run=dry_run)


def pull(
    refs: Sequence[str],
    remote: str,
    *,
    zoo: Zoo | None = None,
    name: str | None = None,
    force: bool = False,
    backbone: bool = True,
    dry_run: bool = False,
    require_signed: bool = False,
    public_key: Path | None = None,
) -> Shared:
    """Bring entries of a remote into a zoo; no refs mean all. The arguments are those of `push`, and of `vtzoo.signing.policy`.

    Raises:
        NotFound: the remote has no such entry, or lacks an object of it.
        Conflict: a name is taken here by other content.
        Corrupt: what came is not what the remote's index says.
        Mismatch: an entry, there or already here, is not signed and has to be, or not by the owner of the key; nothing of any is fetched.
        Network: it can't be reached.
    """
    wanted = signing.policy(require_signed=require_signed, public_key=public_key)
    zoo, there, began = zoo or Zoo.find(), open_remote(remote), time.monotonic()
    index, token = patiently(there.index)
    if not token:
        raise NotFound(f"{there.where} has no {INDEX}", "check the URL: it is that of a zoo")
    every = entries_of(index)
    chosen = [resolve(ref, every) for ref in refs] if refs else every
    moves = planned(there, Folder(zoo), chosen, name=name, force=force, backbone=backbone, action="pull")
    refuse_conflicts(moves, str(zoo.root))
    _check_signed(there, moves, wanted)
    _check_held(zoo, moves, wanted)
    moved = 0 if dry_run else _pull(there, zoo, moves, force=force)
    return _shared(there, moves, moved, began, dry_run=dry_run)


def sync(remote: str, *, zoo: Zoo | None = None, dry_run: bool = False) -> Shared:
    """Bring what each side lacks to the other; names that have other content on each side are listed, and left.

    A remote that can only be read gives and takes nothing.

    Raises:
        Network: it can't be reached.
    """
    zoo, there, began = zoo or Zoo.find(), open_remote(remote), time.monotonic()
    here = Folder(zoo)
    mine, theirs = entries_of(here.index()[0]), entries_of(patiently(there.index)[0])
    pulls = planned(there, here, theirs, action="pull", backbone=False)
    _check_signed(there, pulls, signing.policy())
    pushes = [] if there.read_only else planned(here, there, mine, action="push", backbone=False)
    told = {m.entry.name for m in pulls}
    pushes = [m for m in pushes if m.action == "push" or m.entry.name not in told]
    moved = 0 if dry_run else _pull(there, zoo, pulls) + _push(zoo, there, pushes)
    return _shared(there, [*pulls, *pushes], moved, began, dry_run=dry_run)


def _push(zoo: Zoo, remote: Remote, moves: Sequence[Move], *, force: bool = False) -> int:
    """Send objects, then publish; gives the bytes sent."""
    moving = [m for m in moves if m.action == "push"]
    sizes = {digest: size for m in moving for digest, size in m.sizes.items()}
    for digest, size in sizes.items():
        path = zoo.object(digest)
        if sha256(path) != digest:
            raise Corrupt(f"{path} is damaged: it is not what its name says", "see: vtzoo fsck")
        say(f"sending {digest[:12]}… ({size:,} bytes) to {remote.where}")
        patiently(lambda digest=digest, path=path: remote.upload(digest, path))
    if moving:
        _publish(remote, [m.new for m in moving], force=force)
    return sum(sizes.values())


def _publish(remote: Remote, entries: Sequence[Entry], *, force: bool) -> None:
    """Add entries to a remote's index, however many others write to it.

    Raises:
        Conflict: a name was taken meanwhile, or the index keeps changing.
    """
    for failures in range(1, _SWAPS + 1):
        index, token = patiently(remote.index)
        told = [(e, verdict(index, e, e.name, force=force)) for e in entries]
        if taken := [e.name for e, said in told if said == "conflict"]:
            raise Conflict(
                f"in {remote.where} '{taken[0]}' was taken meanwhile", "give yours another name with --as NAME"
            )
        missing = [e for e, said in told if not said]
        changed = deepcopy(index)
        for entry in missing:
            changed.sections[entry.section][entry.name] = entry.facts
        if not missing or patiently(lambda changed=changed, token=token: remote.publish(changed, token)):
            return
        patience.PATIENCE.pause(min(failures, 3))
    raise Conflict(f"the index of {remote.where} keeps changing", "try again when fewer push to it")


def _pull(remote: Remote, zoo: Zoo, moves: Sequence[Move], *, force: bool = False) -> int:
    """Fetch objects, entry by entry, each published when it is whole; gives the bytes received."""
    keeper, moved = copy(zoo), 0
    keeper.command = ""  # an entry keeps the command that made it
    here = Folder(zoo).index()[0]
    moving = [(m, verdict(here, m.entry, m.new.name, force=force)) for m in moves if m.action == "pull"]
    for move, _ in moving:
        if move.new.name not in here.sections[move.new.section]:
            keeper.check_free(move.new.section, move.new.name)
    for move, listed in moving:
        for digest in sorted(move.entry.objects):
            if size := move.sizes.get(digest):
                say(f"fetching {digest[:12]}… of {move.new.name} ({size:,} bytes) from {remote.where}")
            most = most_bytes(move.entry, digest)
            moved += fetch(remote, digest, keeper, most_bytes=most, tensors=_is_tensors(move.entry, digest))
        if not listed:
            old = here.sections[move.new.section].get(move.new.name)
            replace = Entry(move.new.section, move.new.name, old) if old is not None else False
            keeper.put(move.new.section, move.new.name, move.new.facts, replace=replace)
    return moved


def _check_signed(remote: Remote, moves: Sequence[Move], wanted: signing.Policy) -> None:
    """Compare signatures before anything else is fetched; see `signing.check`."""

    def read(digest: str) -> bytes:
        size = patiently(lambda: remote.size(digest))
        end = min(signing.LIMIT_BYTES + 1 if size is None else size, signing.LIMIT_BYTES + 1)
        return patiently(lambda: b"".join(remote.stream(digest, 0, end)))

    for move in moves:
        if move.action == "pull":
            signing.check(move.entry, read, wanted)


def _check_held(zoo: Zoo, moves: Sequence[Move], wanted: signing.Policy) -> None:
    """Likewise what is here already with the same files, since its facts stay those that it has here."""
    here = Folder(zoo).index()[0]
    for move in moves:
        if verdict(here, move.entry, move.new.name, force=False) == "none":
            own = replace(move.new, facts=here.sections[move.new.section][move.new.name])
            signing.check(own, lambda digest: zoo.object(digest).read_bytes(), wanted)


def _is_tensors(entry: Entry, digest: str) -> bool:
    """Whether an object has to be a safetensors file: of a model by its name among the files, else all but a signature."""
    if entry.section != "models":
        return digest != signature_object(entry.facts)
    return any(own == digest and name.endswith(".safetensors") for name, own in entry.facts["files"].items())


def _shared(remote: Remote, moves: Sequence[Move], moved: int, began: float, *, dry_run: bool) -> Shared:
    items = [
        Item(ref=m.new.name, section=m.new.section, action=m.action, size_bytes=sum(m.sizes.values())) for m in moves
    ]
    seconds = round(time.monotonic() - began, 3)
    return Shared(remote=remote.where, entries=items, dry_run=dry_run, moved_bytes=moved, seconds=seconds)

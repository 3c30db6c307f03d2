"""Give a delta's task another name, so that two deltas of one task can be merged."""

from vtzoo import talk
from vtzoo.delta import Delta, renamed, stored
from vtzoo.headers import read_header
from vtzoo.lineage import parents
from vtzoo.refs import check_name
from vtzoo.results import Result
from vtzoo.zoo import Zoo


def rename_task(*, ref: str, old: str, new: str, zoo: Zoo | None = None) -> Result:
    """Write a delta anew with a task of another name; its entry keeps its name and what made it, its digest changes.

    Args:
        ref: a delta of the zoo.
        old: the task's name.
        new: its new one.
        zoo: where the delta is.

    Raises:
        NotFound: no such delta, or no such task in it.
        UsageError: the new name is not legal.
        Conflict: the delta has a task of that name, or was changed by someone else meanwhile.
    """
    zoo = zoo or Zoo.find()
    entry = zoo.resolve(ref, "deltas")
    delta = renamed(Delta.open(zoo.object(entry.digest)), old, check_name(new))
    digest, size = stored(delta, zoo)
    facts = {"command": "", **entry.facts, "digest": digest, "size_bytes": size}
    headers = {e.name: read_header(zoo.object(e.digest)) for e in zoo.entries("deltas")}
    made = [name for name, header in headers.items() if entry.digest in parents(header["lineage"])]
    if made:
        talk.say(f"{', '.join(made)} came from this delta as it was: eval no longer shows it beside them")
    was = [*entry.facts.get("was", []), entry.digest]
    named = [t.name for t in delta.tasks]
    kept = zoo.put("deltas", entry.name, {**facts, "tasks": named, "was": was}, replace=entry)
    return Result(ref=kept.name, path=str(zoo.object(kept.digest)))

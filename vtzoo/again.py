"""A recorded command, and the values with which it runs once more.

An index is no trusted source of commands: only those that make an artifact are run, what they write goes to the zoo or to a folder
that is thrown away, and what they read by name must be what the artifact says it was made from.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtzoo.errors import NotFound, UsageError, VtzooError
from vtzoo.files import sha256
from vtzoo.lineage import Origin, parents
from vtzoo.refs import Entry, as_path, is_path
from vtzoo.spec import as_map
from vtzoo.zoo import Zoo

MANY = ("", "sweep", "demo")
"""Those that make many, and no command at all."""
MAKERS = ("train", "zero-shot", "merge", "distill", "fold", "add delta", "import peft", "import lycoris", "export onnx", "export pt2", "export openvino", "export executorch")  # fmt: skip
"""The commands that make a delta or a model."""
REFS = ("ref", "refs", "teachers", "more")
"""Their options that name what the artifact was made from, in the order in which it is recorded."""
BESIDE = ("backbone", "student", "init_from")
"""Those that may name an entry, too."""
DROPPED: dict[str, Any] = {"report": None, "track": None, "resume": False, "baseline": False, "latency": False, "check_cache": 0, "explain": False, "compare": False}  # fmt: skip
"""What has no part in the artifact."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command line, parsed: the verb, and its options by their names in Python; `handle` is the parser's own."""

    command: str
    verb: str
    given: Mapping[str, Any]
    handle: Any = field(default=None, repr=False)


def check_verb(verb: str) -> None:
    """Refuse a command that makes no single artifact.

    Raises:
        UsageError: says which do.
    """
    if verb not in MAKERS:
        raise UsageError(f"the recorded command is 'vtzoo {verb}', which makes no single entry", f"only these are run again: {', '.join(MAKERS)}")  # fmt: skip


def check_kept(line: Line) -> None:
    """Refuse a command that keeps nothing, or that says a pickle may be read: that is for the user to say.

    Raises:
        UsageError: it was a dry run, or wrote a file alone; or it has --from-pickle.
    """
    if line.given.get("from_pickle"):
        said = f"the recorded 'vtzoo {line.verb}' reads a pickle, which may run code"
        raise UsageError(said, "if you trust where it is from, type the command yourself: vtzoo show REF tells it")
    if line.given.get("dry_run") or not (line.given.get("name") or line.given.get("config")):
        raise UsageError(f"the recorded 'vtzoo {line.verb}' keeps nothing in a zoo", "make it anew, with --name")


def trained_line(before: Origin, data: Sequence[str]) -> str:
    """The line that would train a delta, by its own header: of one that has none of its own, or was trained among others.

    Raises:
        UsageError: it wasn't trained, or nobody says where the images are.
    """
    name = before.name
    recipe = as_map(before.said.get("recipe"))
    if before.lineage.get("verb") != "train" or not recipe:
        raise UsageError(f"'{name}' has no recorded command", f"vtzoo log {name} tells what it was made from")
    if len(data) != 1:
        raise UsageError(f"'{name}' was trained on images of which only the digest is recorded", f"vtzoo reproduce {name} --data DATA")  # fmt: skip
    spec = before.lineage.get("composed_by") or before.said.get("method")
    knobs = [f"--set={k}={v}" for k, v in recipe.items() if v is not None and k != "preset"]
    words = ["train", "--backbone", before.backbone.get("name"), "--data", data[0], "--method", spec, "--name", name]
    return shlex.join(["vtzoo", *map(str, words), f"--recipe={recipe.get('preset', 'default')}", *knobs])


def parents_of(zoo: Zoo, before: Origin, line: Line) -> list[Entry]:
    """The entries that the command needs: those that the artifact was made from, and others that it names."""
    marks = set(parents(before.lineage))
    found = [e for e in zoo.entries() if marks & e.objects]
    found += [e for text in _named(line, (*REFS, *BESIDE)) if (e := _entry(zoo, text)) is not None]
    mark = before.backbone.get("fingerprint")
    found += [e for e in zoo.entries("backbones") if mark and e.facts.get("fingerprint") == mark]
    own = (before.entry.section, before.entry.name) if before.entry else None
    return list({k: e for e in found if (k := (e.section, e.name)) != own and not e.builtin}.values())


def given_again(zoo: Zoo, before: Origin, line: Line, data: Sequence[str], outside: Path) -> dict[str, Any]:
    """The values to run with.

    Args:
        zoo: where the parents are.
        before: what the artifact says of itself.
        line: the command.
        data: in place of the recorded `--data`, if any.
        outside: a folder for what it also writes.

    Raises:
        NotFound: a parent is no longer here.
        UsageError: `data` has another number.
    """
    own = {k: v for k, v in DROPPED.items() if k in line.given}
    if line.given.get("out") is not None:
        own["out"] = outside / _file_name(line.given["out"])
    if data:
        own["data"] = _data(line, data)
    if not line.given.get("without"):  # of a merge that a task left the deltas that stay are recorded
        own |= _refs(zoo, before, line)
    return own | _backbone(zoo, before, line)


def missing_data(line: Line) -> bool:
    """Whether images that the command names are nowhere on this disk."""
    told = line.given.get("data") or ()
    texts = [told] if isinstance(told, str) else told
    return any(not any(map(os.path.exists, (text, text.partition("=")[2]))) for text in texts)


def _file_name(out: Path) -> str:
    """Its last part, which some formats write into the file; of `..` and the like nothing is kept."""
    return "out" if out.name in ("", "..") else out.name


def _data(line: Line, data: Sequence[str]) -> Any:
    """Where images are now; a task that stood before them stays before them.

    Raises:
        UsageError: the command names images another number of times.
    """
    recorded = line.given.get("data")
    if isinstance(recorded, str) and len(data) == 1:
        return data[0]
    many = list(recorded) if isinstance(recorded, list | tuple) else []
    if line.given.get("config") and not recorded:  # the file may name them
        return list(data)
    if len(many) != len(data):
        count = len(many) or int(isinstance(recorded, str))
        raise UsageError(
            f"the recorded command has --data {count} times, not {len(data)}", "give it as often, in the same order"
        )
    tasks = [old.partition("=") for old in many]
    return [f"{t}={new}" if equals and "=" not in new else new for (t, equals, _), new in zip(tasks, data, strict=True)]


def _refs(zoo: Zoo, before: Origin, line: Line) -> dict[str, Any]:
    """The options that name parents, each by the name that it has now.

    Raises:
        NotFound: a parent is gone.
    """
    typed = _named(line, REFS)
    marks = parents(before.lineage)
    if not marks or not typed:
        return {}
    here = {d: e for e in zoo.entries() for d in e.objects}
    met = {text: _marks(zoo, text) for text in typed}
    astray = [t for t in typed if not met[t] & set(marks)]
    left = [d for d in marks if not any(d in m for m in met.values())]
    if len(astray) > len(left):
        raise NotFound(f"'{astray[0]}' is not what '{before.name}' was made from", f"see: vtzoo log {before.name}")
    now = dict(zip(astray, left, strict=False))
    if lost := [d for d in now.values() if d not in here]:
        raise NotFound(f"'{before.name}' was made from sha256:{lost[0][:12]}…, which is no longer here", "bring it back: vtzoo pull, or vtzoo add")  # fmt: skip

    def named(text: str) -> str:
        return here[now[text]].name if text in now else text

    return {
        k: named(v) if isinstance(v, str) else [named(t) for t in v]
        for k in REFS if (v := line.given.get(k))
    }  # fmt: skip


def _backbone(zoo: Zoo, before: Origin, line: Line) -> dict[str, str]:
    """The backbone by the name that it has now.

    Raises:
        NotFound: it is gone.
    """
    text, mark = line.given.get("backbone"), str(before.backbone.get("fingerprint") or "")
    if not isinstance(text, str) or not mark:
        return {}
    entry = _entry(zoo, text)
    known = entry.facts.get("fingerprint") if entry else None
    if known == mark:
        return {}
    if (now := next((e for e in zoo.entries("backbones") if e.facts.get("fingerprint") == mark), None)) is not None:
        return {"backbone": now.name}
    if known is None:  # a timm name, or weights that nobody has seen here: building compares them
        return {}
    said = f"'{before.name}' stands on the backbone {mark[:19]}…, which is no longer here"
    raise NotFound(said, "vtzoo add backbone NAME --arch ARCH --weights FILE")


def _named(line: Line, options: Sequence[str]) -> list[str]:
    found: list[str] = []
    for option in options:
        value = line.given.get(option)
        found += [value] if isinstance(value, str) else list(value or ())
    return found


def _entry(zoo: Zoo, text: str) -> Entry | None:
    try:
        return None if is_path(text) else zoo.resolve(text)
    except VtzooError:  # a timm name, or one that is no longer here
        return None


def _marks(zoo: Zoo, text: str) -> set[str]:
    """The digests by which what a ref means now is known."""
    try:
        if is_path(text):
            path = as_path(text)
            return {sha256(path / "model.safetensors" if path.is_dir() else path)}
        entry = zoo.resolve(text)
    except VtzooError:
        return set()
    return {*entry.objects, str(entry.facts.get("fingerprint", "")).removeprefix("sha256:")}

"""What an artifact was made from: the facts that every verb writes down in one form, and the reading of them.

    verb       train, merge, fold, distill, export, import or add
    parents    ["sha256:…"]: the files it was made from, in the order in which they were given
    versions   {"vtzoo": …, "torch": …}: of what made it
    images     of a merge, `lessons` of a student: [{"task", "data", "images"}]; a trained delta has `data` and `images` itself

A delta has them in its header, a model in its entry and its config.json, an exported file in its metadata. Entries made by
earlier versions say less, or write digests without "sha256:"; what isn't said is unknown, and never an error.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from vtzoo import __version__, documents, strict
from vtzoo.errors import Corrupt, Mismatch, NotFound
from vtzoo.files import header, sha256
from vtzoo.refs import Entry, as_path, is_path
from vtzoo.spec import as_list, as_map
from vtzoo.zoo import Zoo

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MARK = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_LINEAGE = (
    "kind",
    "tasks",
    "heads",
    "method",
    "backbone",
    "fingerprint",
    "labels",
    "shape",
    "license",
    "multilabel",
)
_Facts = dict[str, Any]


def record(
    verb: str, parents: Iterable[str] = (), *, packages: Sequence[str] = ("torch", "timm"), **more: Any
) -> _Facts:
    """The facts to write down; `parents` are digests, "" of what has no file."""
    found = [_MARK + d if _DIGEST.fullmatch(d) else d for d in parents if d]
    return {"verb": verb, "parents": found, **more, "versions": versions(packages)}


def versions(packages: Iterable[str] = ("torch", "timm")) -> dict[str, str]:
    """Of vtzoo and of what else an artifact was made with."""
    return {"vtzoo": __version__, **{p: version(p) for p in packages}}


def parents(lineage: Mapping[str, Any]) -> list[str]:
    """The digests of what it was made from, 64 hex digits each; a backbone's fingerprint where it has no file."""
    student = as_map(lineage.get("student"))
    named = [*as_list(lineage.get("parents")), *as_list(lineage.get("teachers")), student.get("giver")]
    return list(dict.fromkeys(d for n in named if (d := bare(n))))


def images(lineage: Mapping[str, Any]) -> list[_Facts]:
    """Which images were seen: `task` ("" where that isn't said), `data` (64 hex digits) and how many, each set once."""
    searched = as_map(lineage.get("searched"))
    said = [lineage] if isinstance(lineage.get("data"), str) else []
    for many in (lineage.get("images"), lineage.get("lessons"), searched.get("images"), lineage.get("heads_images")):
        said += [as_map(i) for i in as_list(many)]
    rows = [{"task": str(s.get("task") or ""), "data": bare(s.get("data")), "images": s.get("images")} for s in said]
    return list({(r["task"], r["data"]): r for r in rows if r["data"]}.values())


def bare(digest: Any) -> str:
    """A digest's 64 hex digits; "" where it is none."""
    text = digest.removeprefix(_MARK) if isinstance(digest, str) else ""
    return text if _DIGEST.fullmatch(text) else ""


def check_images(awaited: Collection[str], seen: Iterable[str]) -> None:
    """Refuse images that aren't those which are awaited; none awaited means any.

    Args:
        awaited: digests, 64 hex digits.
        seen: likewise.

    Raises:
        Mismatch: says both digests.
    """
    other = [d for d in seen if d not in awaited] if awaited else []  # a digest costs reading the images
    if other:
        raise Mismatch(
            f"these images are sha256:{other[0][:12]}…, it was made from sha256:{' or '.join(d[:12] for d in awaited)}…",
            "give the folder that has the very images: --data DIR",
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """An artifact and what it says of itself.

    Attributes:
        name: in the zoo, or the file's.
        kind: backbone, delta, merge, folded, student, export, model; or file, of tensors that say nothing of themselves.
        digest: its file's (of several the weights'), 64 hex digits; "" where it has none.
        facts: of its entry; empty outside a zoo.
        said: its header's document, its config's `vtzoo`, or its metadata.
        lineage: see the module.
        entry: None outside a zoo.
        problem: why its file could not be asked; "" where it could.
    """

    name: str
    kind: str
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    said: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    entry: Entry | None = None
    problem: str = ""

    @property
    def ref(self) -> str:
        """What a person types to name it."""
        return self.name if self.entry or self.name.endswith(".safetensors") else f"./{self.name}"

    @property
    def backbone(self) -> Mapping[str, Any]:
        """Name, fingerprint, licence and preprocessing of the backbone that a delta stands on; of others what is known."""
        own = self.said.get("backbone")
        if isinstance(own, Mapping):
            return cast("Mapping[str, Any]", own)
        return {k: v for k in ("fingerprint", "license") if (v := self.said.get(k))} | ({"name": own} if own else {})


def origin(zoo: Zoo, ref: str, told: Mapping[str, str] | None = None) -> Origin:
    """Find what a ref means and read what it says of itself.

    Args:
        zoo: where names are looked up.
        ref: a name, a delta's file, a plain model's folder, or an exported file.
        told: an exported file's metadata (without "vtzoo." before its keys), which only its runtime can read.

    Raises:
        NotFound: nothing of that name, or a folder without a model.
        UsageError: the name is ambiguous.
        Corrupt: the file is damaged.
    """
    if not is_path(ref):
        return of_entry(zoo, zoo.resolve(ref))
    path = as_path(ref)
    if path.is_dir():
        said = _config(path / CONFIG)
        return Origin(name=path.name, kind=_kind_of(said), digest=sha256(path / WEIGHTS), said=said, lineage=_own(said))
    if told is not None:
        return Origin(name=path.name, kind="export", digest=sha256(path), said=dict(told), lineage=_exported(told))
    said = document(path)
    lineage = as_map(said.get("lineage"))
    kind = _kind(lineage) if said else "file"
    return Origin(name=path.name, kind=kind, digest=sha256(path), said=said, lineage=lineage)


def of_entry(zoo: Zoo, entry: Entry) -> Origin:
    """What an entry, and the file behind it, say.

    Raises:
        NotFound: the file is missing.
        Corrupt: it is damaged.
    """
    facts: _Facts = entry.facts
    known: _Facts = {"name": entry.name, "digest": entry.digest, "facts": facts, "entry": entry}
    if entry.section == "backbones":
        return Origin(kind="backbone", **known)
    if entry.section == "deltas":
        said = document(zoo.object(entry.digest))
        lineage = as_map(said.get("lineage"))
        return Origin(kind=_kind(lineage), said=said, lineage=lineage, **known)
    config = as_map(facts.get("files")).get(CONFIG)
    said = _config(zoo.object(config)) if config else {}
    return Origin(
        kind=str(facts.get("kind") or "model"), said=said, lineage=as_map(facts.get("lineage")) or _own(said), **known
    )


def document(path: Path) -> _Facts:
    """A delta's JSON document; empty where a safetensors file has none."""
    try:
        return strict.record(header(path).metadata.get("vtzoo", "{}"))
    except ValueError as error:
        raise Corrupt(f"{path}: what it says of itself {error}", "make it again, or fetch it again") from error


def _config(path: Path) -> _Facts:
    config = documents.document(path)
    shape = as_map(config.get("pretrained_cfg"))
    return as_map(config.get("vtzoo")) | {
        "labels": as_list(config.get("label_names")),
        "shape": shape,
        "license": shape.get("license"),
    }


def _exported(told: Mapping[str, str]) -> _Facts:
    """What an exported file's metadata say, in the form of the others; of many tasks each has its own digest."""
    try:
        tasks = strict.loads(told.get("tasks", "[]"))
        digests = [told.get("digest"), *(as_map(t).get("digest") for t in as_list(tasks))]
        return {
            "verb": "export",
            "parents": [d for d in digests if d],
            "versions": strict.loads(told.get("versions", "{}")),
        }
    except ValueError as error:
        raise NotFound("the file's metadata don't say what it was made from", "export it again") from error


def _own(said: Mapping[str, Any]) -> _Facts:
    """A config's `vtzoo` without what describes the model itself."""
    return {k: v for k, v in said.items() if k not in _NO_LINEAGE}


def _kind_of(said: Mapping[str, Any]) -> str:
    return str(said.get("kind") or ("folded" if said.get("verb") == "fold" else "model"))


def _kind(lineage: Mapping[str, Any]) -> str:
    return "merge" if lineage.get("verb") == "merge" else "delta"

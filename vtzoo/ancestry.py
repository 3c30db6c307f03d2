"""The graph of what was made from what, around one artifact: data and backbone, delta, merge, fold, student, export.

A link is a digest that an artifact recorded, so it holds whatever the parent is called by now; a parent that the zoo no
longer has stays in the graph by its digest.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtzoo.errors import VtzooError
from vtzoo.lineage import Origin, bare, images, of_entry, parents
from vtzoo.refs import Entry
from vtzoo.spec import as_list, as_map
from vtzoo.zoo import Zoo


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes by id, plain facts each; and by id what it was made from, and as what, in the order in which it was given."""

    root: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    sources: dict[str, dict[tuple[str, str], None]] = field(default_factory=dict[str, dict[tuple[str, str], None]])

    @property
    def edges(self) -> list[dict[str, str]]:
        """What leads from one to the other: `from`, `to` (what was made of it) and `as`."""
        return [{"from": a, "to": b, "as": role} for b, found in self.sources.items() for a, role in found]


def ancestry(zoo: Zoo, start: Origin, *, children: bool = False) -> Graph:
    """Follow an artifact's links back to where they begin.

    Args:
        zoo: where the parents are looked for, its catalogue among it.
        start: the artifact.
        children: also what was made from it; reads what every entry says of itself.
    """
    family = _Family(zoo)
    graph = Graph(root=_id(start))
    _climb(family, graph, start)
    if children:
        _descend(family, graph, start)
    return graph


class _Family:
    """A zoo's entries by what links name: the digest of any of their files, a backbone's fingerprint."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.entries = zoo, zoo.entries()
        self.known: dict[str, Entry] = {}
        for entry in sorted(self.entries, key=lambda e: (e.builtin, e.section == "backbones")):
            was = map(bare, as_list(entry.facts.get("was")))  # before a task of it was renamed
            marks = [*sorted(entry.objects), *was]
            for mark in [*marks, *([bare(entry.facts.get("fingerprint"))] if _is_bare(entry) else [])]:
                if mark:
                    self.known.setdefault(mark, entry)

    def links(self, origin: Origin) -> Iterable[tuple[str, dict[str, Any]]]:
        """What it was made from: a role, and the digest (or name) with what is known besides."""
        backbone = origin.backbone
        if origin.kind in ("delta", "merge") and backbone:
            yield "backbone", {"digest": bare(backbone.get("fingerprint")), "name": str(backbone.get("name") or "")}
        for seen in images(origin.lineage):
            yield "data", {"digest": seen["data"], "images": seen["images"], "task": seen["task"]}
        for digest in parents(origin.lineage):
            yield "parent", {"digest": digest}

    def open(self, entry: Entry) -> Origin:
        """What an entry says; of one whose file is missing or damaged only that."""
        try:
            return of_entry(self.zoo, entry)
        except VtzooError as error:
            kind = "delta" if entry.section == "deltas" else str(entry.facts.get("kind", "model"))
            known: Any = {"name": entry.name, "digest": entry.digest, "facts": entry.facts, "entry": entry}
            return Origin(kind=kind, problem=error.message, **known)

    def backbone(self, found: Mapping[str, Any]) -> Entry | None:
        """By fingerprint, else the catalogue's of that name, whose weights nobody has seen yet."""
        named = next((e for e in self.entries if _is_bare(e) and e.name == found["name"]), None)
        unseen = named if named and not named.facts.get("fingerprint") else None
        return self.known.get(found["digest"]) or unseen


def _climb(family: _Family, graph: Graph, start: Origin) -> None:
    """Add an artifact and all before it."""
    waiting = deque([start])
    while waiting:
        origin = waiting.popleft()
        here = _id(origin)
        if here in graph.nodes:
            continue
        graph.nodes[here] = _node(origin)
        for role, link in family.links(origin):
            entry = family.backbone(link) if role == "backbone" else family.known.get(link["digest"])
            if role == "data" or entry is None:
                there = f"{role}:{link['digest'] or link.get('name')}"
                graph.nodes.setdefault(there, _lost(role, link, origin))
            else:
                parent = family.open(entry)
                there = _id(parent)
                waiting.append(parent)
            _join(graph, there, here, role)


def _descend(family: _Family, graph: Graph, start: Origin) -> None:
    """Add what was made from an artifact, and from that, with all that it took besides."""
    made: defaultdict[str, list[Origin]] = defaultdict(list)
    for entry in family.entries:
        if not _is_bare(entry):
            origin = family.open(entry)
            for _, link in family.links(origin):
                made[link["digest"]].append(origin)
    seen, waiting = set[str](), deque([start])
    while waiting:
        origin = waiting.popleft()
        if (here := _id(origin)) in seen:
            continue
        seen.add(here)
        marks = {*(origin.entry.objects if origin.entry else ()), origin.digest, bare(origin.facts.get("fingerprint"))}
        if origin.kind != "backbone":
            marks.discard(bare(origin.facts.get("fingerprint")))
        for mark in sorted(marks - {""}):
            for child in made[mark]:
                _climb(family, graph, child)
                waiting.append(child)


def _join(graph: Graph, there: str, here: str, role: str) -> None:
    if there != here:
        graph.sources.setdefault(here, {})[there, role] = None


def _is_bare(entry: Entry) -> bool:
    return entry.section == "backbones"


def _id(origin: Origin) -> str:
    return f"{origin.entry.section}:{origin.name}" if origin.entry else f"file:{origin.digest}"


def _node(origin: Origin) -> dict[str, Any]:
    """What is told of an artifact: only what is known."""
    facts, said = origin.facts, origin.said
    tasks = as_list(facts.get("tasks")) or as_list(said.get("tasks"))
    found = {
        "kind": origin.kind, "name": origin.name, "digest": origin.digest, "verb": str(origin.lineage.get("verb") or ""),
        "method": str(said.get("method") or facts.get("method") or ""), "arch": str(facts.get("arch") or ""),
        "tasks": [str(as_map(t).get("name") if isinstance(t, dict) else t) for t in tasks], "created": str(facts.get("created") or ""),
        "problem": origin.problem, "catalogue": bool(origin.entry and origin.entry.builtin),
    }  # fmt: skip
    return {k: v for k, v in found.items() if v or k in ("kind", "name", "digest")}


def _lost(role: str, link: Mapping[str, Any], child: Origin) -> dict[str, Any]:
    """Images, which no zoo keeps; a foreign file that was brought in; or a parent that is no longer here."""
    foreign = role == "parent" and child.lineage.get("verb") in ("import", "add")
    kind = "file" if foreign else {"parent": "gone"}.get(role, role)
    found = {"kind": kind, "name": link.get("name", ""), "digest": link["digest"], "here": False}
    return found | {k: link[k] for k in ("images", "task") if link.get(k)}

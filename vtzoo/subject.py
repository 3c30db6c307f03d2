"""What a model card is of: the artifact, its graph, what it was made from, and what they say together.

Everything is what is recorded; what isn't is empty. Values come from files that others may have written, so each is looked at first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtzoo import registry
from vtzoo.ancestry import Graph
from vtzoo.catalogue import builtin
from vtzoo.errors import VtzooError
from vtzoo.lineage import Origin, of_entry
from vtzoo.refs import Entry
from vtzoo.spec import Preprocess, as_list, as_map, one_line, tidy
from vtzoo.zoo import Zoo


@dataclass(frozen=True)
class Subject:
    """What the card is of, and what lies around it."""

    zoo: Zoo
    origin: Origin
    graph: Graph
    before: Sequence[Origin]


def before_of(zoo: Zoo, graph: Graph) -> list[Origin]:
    """The artifacts that it was made from, wherever they are, nearest first."""
    marks = list(graph.nodes)[1:]
    entries = {f"{e.section}:{e.name}": e for e in zoo.entries()}
    found: list[Origin] = []
    for mark in marks:
        if mark in entries:
            try:
                found.append(of_entry(zoo, entries[mark]))
            except VtzooError:  # its file is missing: the lineage says so
                continue
    return found


def backbone_of(about: Subject) -> dict[str, Any]:
    """Of the artifact, else of what it was folded or exported from; a student stands on none."""
    for origin in _nearest(about):
        own = dict(origin.backbone)
        if own.get("name"):
            entry = next((e for e in _entries(about) if e.section == "backbones" and e.name == own["name"]), None)
            known = {"license": entry.facts.get("license")} if entry else {}
            return {k: tidy(v) for k, v in {**known, **{k: v for k, v in own.items() if v}}.items()}
        if origin.kind == "student":
            break
    return {}


def _nearest(about: Subject) -> list[Origin]:
    """The artifact, and what it was made from, without backbones."""
    return [o for o in (about.origin, *about.before) if o is about.origin or o.kind != "backbone"]


def _entries(about: Subject) -> list[Entry]:
    return [*about.zoo.entries(), *builtin()]


def tasks_of(about: Subject) -> dict[str, list[str]]:
    """Each task's classes; those of a model from its parents, where it doesn't say them itself."""
    known: dict[str, list[str]] = {}
    for origin in reversed((about.origin, *about.before)):
        for task in map(as_map, [*as_list(origin.said.get("tasks")), *as_list(origin.said.get("heads"))]):
            if task:
                known[tidy(task.get("name"))] = [tidy(c) for c in as_list(task.get("classes"))]
        if (labels := as_list(origin.said.get("labels"))) and len(names := names_of(origin)) == 1:
            known[names[0]] = [tidy(c) for c in labels]
    return {n: known.get(n, []) for n in names_of(about.origin)}


def names_of(origin: Origin) -> list[str]:
    """Of its tasks."""
    tasks = as_list(origin.facts.get("tasks")) or as_list(origin.said.get("tasks"))
    return [tidy(as_map(t).get("name") if isinstance(t, dict) else t) for t in tasks]


def shape_of(about: Subject) -> Preprocess | None:
    """How it looks at images: by its own first task, else by that of what it was made from, the nearest first."""
    for origin in _nearest(about):
        for told in [as_map(origin.said.get("shape")), *map(as_map, as_list(origin.said.get("tasks")))]:
            if told.get("input_size"):
                return Preprocess.of(told)
    return None


def method_of(origin: Origin) -> str:
    """The spec as people read it; "" of a plain model."""
    return code(origin.said.get("method") or origin.facts.get("method") or "")


def code(text: Any) -> str:
    """What someone else wrote, as it may stand between backticks: specs keep their brackets."""
    return one_line(text).replace("`", "'")


def folds(origin: Origin) -> bool:
    """Whether every part has an exact form in plain weights, as its own page says."""
    parts = [
        str(p.get("method")) for p in as_list(as_map(origin.said.get("config")).get("parts")) if isinstance(p, Mapping)
    ]
    return bool(parts) and all(
        p in registry.names("methods") and registry.card("methods", p).verdict == "yes" for p in parts
    )

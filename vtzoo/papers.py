"""The papers of the methods, merges and losses that an artifact was made with, as their own pages name them."""

from collections.abc import Iterable
from typing import Any

from vtzoo import knobs, registry
from vtzoo.errors import VtzooError
from vtzoo.spec import as_list, as_map
from vtzoo.subject import Subject, method_of


def citation(about: Subject) -> list[str]:
    """The papers of its method, and of the steps before."""
    found: dict[str, str] = {}
    for origin in (about.origin, *about.before):
        specs = [
            (("methods", "merges"), method_of(origin)),
            (("losses",), "+".join(str(as_map(t).get("function")) for t in as_list(origin.lineage.get("loss")))),
        ]
        for kinds, spec in specs:
            for name in _parts(spec):
                found |= _paper(kinds, name)
    rows = [f"- {summary} {_link(paper)}".rstrip() for paper, summary in found.items()]
    return ["## Citation", "", *rows] if rows else []


def _paper(kinds: Iterable[Any], name: str) -> dict[str, str]:
    for kind in kinds:
        if name in registry.names(kind):
            page = registry.card(kind, name)
            return {page.paper: page.summary.replace(f", {page.paper}", "")} if page.paper else {}
    return {}


def _link(paper: str) -> str:
    kind, _, number = paper.partition(":")
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind, "")
    return f"[{paper}]({where}{number})" if where else paper


def _parts(spec: str) -> list[str]:
    try:
        return [p.name for p in knobs.parse(spec)] if spec else []
    except VtzooError:
        return []

"""An artifact's graph as a tree for people, and as text that Mermaid draws."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vtzoo.spec import tidy

from ._blocks import Block, Line, Tree

Nodes = Mapping[str, Mapping[str, Any]]
Near = Mapping[str, list[str]]
DEEP = 64
"""Levels that are drawn."""


def trees(found: dict[str, Any]) -> list[Block]:
    """What it was made from; where that was asked for, what was made from it."""
    nodes: Nodes = {n["id"]: n for n in found["nodes"]}
    below, above = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for edge in found["edges"]:
        below[edge["to"]].append(edge["from"])
        above[edge["from"]].append(edge["to"])
    before = _tree(found["root"], nodes, below)
    if not found["children"]:
        return [before]
    after = _tree(found["root"], nodes, above)
    made = [Line(""), Line("made from it:"), *after.below] if after.below else [Line(""), Line("nothing here was made from it")]  # fmt: skip
    return [before, *made]


def _tree(root: str, nodes: Nodes, near: Near) -> Tree:
    """Follow the links; what came up before is only named."""
    seen: set[str] = set()

    def grown(node: str, depth: int) -> Tree:
        text, others = words(nodes[node]), near.get(node, [])
        if others and (node in seen or depth == DEEP):
            return Tree(f"{text} {'(above)' if node in seen else '… (all of it: --json)'}")
        seen.add(node)
        return Tree(text, [grown(other, depth + 1) for other in others])

    return grown(root, 0)


def words(node: Mapping[str, Any]) -> str:
    """One artifact in a line."""
    digest = f"sha256:{node['digest'][:12]}" if node["digest"] else ""
    if node["kind"] == "data":
        count = f"{node['images']} images" if node.get("images") else ""
        return _joined("data", node.get("task", ""), count, digest)
    if node.get("here") is False:
        return _joined(node["kind"], node["name"], digest, "no longer here" if node["kind"] == "gone" else "")
    how = node.get("method") or node.get("arch") or ""
    tasks = f"of {', '.join(node['tasks'])}" if node.get("tasks") else ""
    where = "in the catalogue" if node.get("catalogue") else ""
    return _joined(
        node["name"],
        node["kind"],
        how,
        tasks,
        str(node.get("created", ""))[:10],
        digest,
        where,
        node.get("problem", ""),
    )


def _joined(*parts: str) -> str:
    return "  ".join(p for p in parts if p)


def mermaid(found: dict[str, Any]) -> str:
    """The graph as Mermaid's flowchart, which GitHub and the hub draw in Markdown."""
    ids = {node["id"]: f"n{i}" for i, node in enumerate(found["nodes"])}
    lines = ["graph LR"]
    for node in found["nodes"]:
        label = tidy(_joined(node["name"] or node.get("task", ""), node["kind"])).replace('"', "'")
        lines.append(f'  {ids[node["id"]]}["{label}"]')
    lines += [f"  {ids[e['from']]} --> {ids[e['to']]}" for e in found["edges"]]
    return "\n".join(lines)

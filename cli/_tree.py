"""An artifact's graph as a tree for people, and as text that Mermaid draws."""

from collections.abc import Callable, Mapping
from typing import Any

from ._blocks import Block, Line, Tree

Nodes = Mapping[str, Mapping[str, Any]]


def trees(found: dict[str, Any]) -> list[Block]:
    """What it was made from; where that was asked for, what was made from it."""
    nodes: Nodes = {n["id"]: n for n in found["nodes"]}
    before = _tree(found["root"], nodes, lambda n: [(e["from"], e["as"]) for e in found["edges"] if e["to"] == n])
    if not found["children"]:
        return [before]
    after = _tree(found["root"], nodes, lambda n: [(e["to"], "") for e in found["edges"] if e["from"] == n])
    made = [Line(""), Line("made from it:"), *after.below] if after.below else [Line(""), Line("nothing here was made from it")]  # fmt: skip
    return [before, *made]


def _tree(root: str, nodes: Nodes, near: Callable[[str], list[tuple[str, str]]]) -> Tree:
    """Follow the links; what came up before is only named."""
    seen: set[str] = set()

    def grown(node: str) -> Tree:
        text = words(nodes[node])
        if node in seen and near(node):
            return Tree(f"{text} (above)")
        seen.add(node)
        return Tree(text, [grown(other) for other, _ in near(node)])

    return grown(root)


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
        label = _joined(node["name"] or node.get("task", ""), node["kind"]).replace('"', "'")
        lines.append(f'  {ids[node["id"]]}["{label}"]')
    lines += [f"  {ids[e['from']]} --> {ids[e['to']]}" for e in found["edges"]]
    return "\n".join(lines)

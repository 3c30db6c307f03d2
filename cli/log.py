"""`vtzoo log`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtzoo.refs import EXPORTS, as_path, is_path

from . import _tree
from ._blocks import Line
from ._options import Ref
from ._session import Session

if TYPE_CHECKING:
    from vtzoo.ancestry import Graph

EXAMPLES = ("vtzoo log fashion/lora", "vtzoo log fashion/lora --children", "vtzoo log ./fashion.onnx --mermaid")


def run(
    ctx: typer.Context,
    *,
    ref: Ref,
    children: Annotated[bool, typer.Option("--children", help="Also what was made from it.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print the graph as a Mermaid flowchart.")] = False,
) -> None:
    """Show what an entry was made from: data, deltas, merges, folds, teachers."""
    session = Session.of(ctx)
    zoo = session.zoo()
    from vtzoo.ancestry import ancestry
    from vtzoo.lineage import origin

    told = _told(ref)
    graph = ancestry(zoo, origin(zoo, ref, told), children=children)
    session.show(_facts(graph, children=children), (lambda f: [Line(_tree.mermaid(f))]) if mermaid else _tree.trees)


def _told(ref: str) -> dict[str, str] | None:
    """An exported file's metadata, which its runtime reads; None of anything else."""
    if not is_path(ref) or Path(ref).suffix not in EXPORTS:
        return None
    from vtzoo.formats import metadata

    return metadata(as_path(ref))


def _facts(graph: "Graph", *, children: bool) -> dict[str, Any]:
    nodes = [{"id": name, **facts} for name, facts in graph.nodes.items()]
    return {"root": graph.root, "children": children, "nodes": nodes, "edges": graph.edges}

"""`vtzoo log`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _tree
from ._blocks import Line
from ._options import Ref
from ._origin import origin_of
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

    graph = ancestry(zoo, origin_of(zoo, ref), children=children)
    session.show(_facts(graph, children=children), (lambda f: [Line(_tree.mermaid(f))]) if mermaid else _tree.trees)


def _facts(graph: "Graph", *, children: bool) -> dict[str, Any]:
    nodes = [{"id": name, **facts} for name, facts in graph.nodes.items()]
    return {"root": graph.root, "children": children, "nodes": nodes, "edges": graph.edges}

"""Operator set 18 written in the words of 17.

Set 18 changed few operators: reductions take their axes as an input, Split a count, Pad and Resize axes. What a graph uses of that is
written as 17 has it; ONNX's own converter lacks Pad and Split.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vtzoo.errors import NotExportable

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

NEW, OLD = 18, 17


def lowered(model: "ModelProto") -> None:
    """Write a model of set 18 in set 17, in place.

    Raises:
        NotExportable: it uses what 17 can't say.
    """
    from onnx import defs

    for node in model.graph.node:
        if node.domain == "" and defs.get_schema(node.op_type, NEW, "").since_version > OLD:
            rewrite = _REWRITES.get(node.op_type)
            if rewrite is None or not rewrite(node, model.graph):
                raise NotExportable(
                    f"operator set 17 can't say this network's {node.op_type}", "use --opset 18 or newer"
                )
    for used in model.opset_import:
        used.version = OLD if used.domain == "" else used.version


def _reduced(node: "NodeProto", graph: "GraphProto") -> bool:
    """The axes as an attribute."""
    from onnx import helper

    if len(node.input) > 1 and node.input[1]:
        axes = _constant(node.input[1], graph)
        if axes is None:
            return False
        node.attribute.append(helper.make_attribute("axes", axes))
    del node.input[1:]
    kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
    noop = any(a.i for a in node.attribute if a.name == "noop_with_empty_axes")
    del node.attribute[:]
    node.attribute.extend(kept)
    return not noop or any(a.name == "axes" for a in kept)


def _split(node: "NodeProto", graph: "GraphProto") -> bool:
    """Sizes given, which both know; or a count, which 17 takes from the outputs, for equal parts."""
    del graph
    kept = [a for a in node.attribute if a.name != "num_outputs"]
    del node.attribute[:]
    node.attribute.extend(kept)
    return True  # unequal parts fail ONNX's check of shapes


def _padded(node: "NodeProto", graph: "GraphProto") -> bool:
    """The same but for axes."""
    del graph
    return len(node.input) < 4 or not node.input[3]


def _resized(node: "NodeProto", graph: "GraphProto") -> bool:
    """The same but for axes and what came with them."""
    del graph
    return not any(
        a.name in ("antialias", "axes", "keep_aspect_ratio_policy") and (a.i or a.ints or a.s) for a in node.attribute
    )


def _scattered(node: "NodeProto", graph: "GraphProto") -> bool:
    """The same but for two reductions."""
    del graph
    return not any(a.name == "reduction" and a.s in (b"min", b"max") for a in node.attribute)


def _constant(name: str, graph: "GraphProto") -> list[int] | None:
    from onnx import numpy_helper

    found = next((t for t in graph.initializer if t.name == name), None)
    return None if found is None else [int(v) for v in numpy_helper.to_array(found)]


_REWRITES: dict[str, Callable[["NodeProto", "GraphProto"], bool]] = {
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"), _reduced),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), _reduced),
    **dict.fromkeys(("ScatterElements", "ScatterND"), _scattered),
    "Split": _split,
    "Pad": _padded,
    "Resize": _resized,
}  # fmt: skip

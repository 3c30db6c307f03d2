"""Normalising in the graph: a file that takes pictures as PIL and numpy hold them, uint8 [n, height, width, 3].

    y = ((x / 255) - mean) / std, and channels first

The three operations are those of torchvision's `to_tensor` and `normalize` in their order, so the network's input is the same to the
bit. Resizing and cropping stay outside: ONNX's Resize gives other pixels than PIL's filters, which work on whole numbers.
"""

from typing import TYPE_CHECKING

import numpy as np

from vtzoo.onnx.describe import INPUT
from vtzoo.spec import Preprocess

if TYPE_CHECKING:
    from onnx import ModelProto

NAMES = ("float", "unit", "centred", "scaled")


def embed(model: "ModelProto", shape: Preprocess) -> None:
    """Put the normalisation before the graph's only input, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    old = graph.input[0]
    batch, _, height, width = old.type.tensor_type.shape.dim
    sides = [d.dim_param or d.dim_value for d in (batch, height, width)]
    inside, (floats, unit, centred, scaled) = f"{INPUT}_normalized", (f"{INPUT}_{n}" for n in NAMES)
    for node in graph.node:
        node.input[:] = [inside if n == old.name else n for n in node.input]
    values = {"byte": [255.0], "mean": shape.mean, "std": shape.std}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(v, dtype=np.float32), f"{INPUT}_{n}") for n, v in values.items()
    )
    before = [
        helper.make_node("Cast", [INPUT], [floats], to=TensorProto.FLOAT),
        helper.make_node("Div", [floats, f"{INPUT}_byte"], [unit]),
        helper.make_node("Sub", [unit, f"{INPUT}_mean"], [centred]),
        helper.make_node("Div", [centred, f"{INPUT}_std"], [scaled]),
        helper.make_node("Transpose", [scaled], [inside], perm=[0, 3, 1, 2]),
    ]
    for node in before:
        node.name = f"{INPUT}_{node.op_type}_{node.output[0]}"
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *after])
    graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [*sides, 3]))

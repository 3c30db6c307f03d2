"""A network of many tasks as one ONNX graph: images and each image's task in, logits out.

torch translates the network with the row numbers of every task as inputs of their own, since it can't tell beforehand how many there are.
Here they are made of `task_id`: where task_id is t, NonZero. Tensors that several deltas have in common are kept once.
"""

from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtzoo.onnx.convert import OPSET, translated
from vtzoo.onnx.describe import INPUT, TASK_ID

if TYPE_CHECKING:
    from onnx import ModelProto


def convert_tasks(network: nn.Module, size: tuple[int, int, int], tasks: int, opset: int = OPSET) -> "ModelProto":
    """Translate a network in evaluation mode.

    Args:
        network: takes images [n, 3, h, w] and for each task the numbers of its images [n_t]: `mixing.Mixed`.
        size: of an image, [channels, height, width].
        tasks: how many.
        opset: ONNX operator set.

    Raises:
        NotExportable: the exporter's own reason.
    """
    rows = [torch.zeros(t + 2, dtype=torch.int64) for t in range(tasks)]  # sizes that differ
    batch = sum(map(len, rows)) + 1
    free = torch.export.Dim
    shapes = ({0: free("batch")}, [{0: free(f"images_{t}")} for t in range(tasks)])
    names = [f"rows_{t}" for t in range(tasks)]
    model = translated(network, (torch.zeros(batch, *size), rows), shapes, [INPUT, *names], "logits", opset)
    _asked(model, names)
    _once(model)
    return model


def _asked(model: "ModelProto", names: list[str]) -> None:
    """Make the rows of each task of one input, in place."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    before = []
    constants = {"axis": np.array([0])}
    for number, name in enumerate(names):
        constants[f"number_{number}"] = np.array(number)
        before += [
            helper.make_node("Equal", [TASK_ID, f"{TASK_ID}_number_{number}"], [f"{name}_mask"]),
            helper.make_node("NonZero", [f"{name}_mask"], [f"{name}_found"]),
            helper.make_node("Squeeze", [f"{name}_found", f"{TASK_ID}_axis"], [name]),
        ]
    for node in before:
        node.name = f"{TASK_ID}_{node.op_type}_{node.output[0]}"
    after = list(graph.node)
    del graph.node[:], graph.input[1:]
    graph.node.extend([*before, *after])
    graph.initializer.extend(numpy_helper.from_array(v, f"{TASK_ID}_{n}") for n, v in constants.items())
    graph.input.append(helper.make_tensor_value_info(TASK_ID, TensorProto.INT64, [batch]))


def _once(model: "ModelProto") -> None:
    """Keep equal tensors once, in place."""
    from onnx import numpy_helper

    graph = model.graph
    first: dict[tuple[str, tuple[int, ...], str], str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        key = (str(value.dtype), value.shape, sha256(value.tobytes()).hexdigest())
        same[tensor.name] = first.setdefault(key, tensor.name)
        if same[tensor.name] == tensor.name:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [same.get(n, n) for n in node.input]

"""Eight bits: weights int8 by output channel, activations uint8, with onnxruntime.quantization.

    dynamic   activations are quantised as they come, by their own range: MatMul and Gemm
    static    by ranges that images showed (QuantizeLinear and DequantizeLinear around each layer): MatMul, Gemm and Conv

Only layers with weights of their own are quantised: products of activations, norms and softmax stay float. So do the outputs of
MatMul and Gemm, which costs no speed and saves a rounding. The graph goes through onnxruntime's own preparation first (shapes,
constants folded, BatchNorm in its convolution), as it advises.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtzoo.onnx._quiet import quiet
from vtzoo.onnx.describe import INPUT

if TYPE_CHECKING:
    from onnx import ModelProto

DYNAMIC, STATIC = ("MatMul", "Gemm"), ("MatMul", "Gemm", "Conv")
_STATIC_OPTIONS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}


def prepared(model: "ModelProto") -> "ModelProto":
    """The same graph as onnxruntime's quantisation wants it."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        given, path = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, str(given))  # of a model in memory it would take the weights away
        quant_pre_process(str(given), str(path), skip_symbolic_shape=True)
        made = onnx.load(str(path))
    for i, node in enumerate(made.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return made


def layers(model: "ModelProto", operators: Collection[str]) -> list[str]:
    """The nodes that have weights, in the graph's order."""
    weights = {t.name for t in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type in operators and n.input[1] in weights]


def share(model: "ModelProto", names: Collection[str]) -> float:
    """Which part of all bytes of weights the named nodes have."""
    sizes = {t.name: len(t.raw_data) for t in model.graph.initializer}
    own = {n.input[1] for n in model.graph.node if n.name in names}
    return sum(sizes.get(n, 0) for n in own) / max(1, sum(sizes.values()))


class Reader:
    """Images as onnxruntime's calibration asks for them: one batch after the other, then None."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        x = next(self.batches, None)
        return None if x is None else {INPUT: x.numpy()}


def ranges(model: "ModelProto", batches: Iterable[Tensor]) -> Any:
    """The least and largest value of each activation over images [n, 3, h, w], as onnxruntime keeps them."""
    import onnx
    from onnxruntime.quantization import create_calibrator

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "prepared.onnx"
        onnx.save(model, str(path))
        calibrator = create_calibrator(path, list(STATIC), str(Path(folder) / "augmented.onnx"))
        calibrator.collect_data(Reader(batches))  # type: ignore[arg-type] - it asks for no more than get_next
        return calibrator.compute_data()


def static(model: "ModelProto", seen: Any, names: Collection[str]) -> "ModelProto":
    """The named layers in eight bits, by the ranges that were seen."""
    from onnxruntime.quantization import QDQQuantizer, QuantType

    with quiet():
        quantizer = QDQQuantizer(
            deepcopy(model), True, False, QuantType.QInt8, QuantType.QUInt8, seen, list(names), [], list(STATIC), _STATIC_OPTIONS
        )  # fmt: skip
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def dynamic(model: "ModelProto", names: Collection[str]) -> "ModelProto":
    """The named layers in eight bits, each activation by its own range."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            deepcopy(model), path, list(DYNAMIC), per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=list(names)
        )  # fmt: skip
        return onnx.load(str(path))

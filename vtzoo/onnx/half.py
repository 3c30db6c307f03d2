"""Half precision: weights and products in float16, input and output stay float32.

onnxruntime's own converter does it (`onnxruntime.transformers.float16`). Left in float32 is what would overflow or lose too much in
float16: operators that the converter knows, and here the reductions of a norm over many values.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

BLOCKED = ("ReduceSum", "ReduceMean", "ReduceL2", "Pow", "Resize")


def halved(model: "ModelProto") -> "ModelProto":
    """The model with float16 inside; the given one is used up."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    made = convert_float_to_float16(model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *BLOCKED])
    del made.graph.value_info[:]  # it leaves some types as they were
    ONNXModel(made).topological_sort()  # its casts stand at the end
    return made

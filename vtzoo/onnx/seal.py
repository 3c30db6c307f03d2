"""The last step of a graph on its way to a file: its metadata, ONNX's own check, its bytes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vtzoo.errors import NotExportable

if TYPE_CHECKING:
    from onnx import ModelProto


def seal(model: "ModelProto", metadata: Mapping[str, str]) -> bytes:
    """Write metadata and the input's denotation into a graph and check it.

    Raises:
        NotExportable: it is no valid ONNX; the checker's reason.
    """
    import onnx

    onnx.helper.set_model_props(model, dict(metadata))
    model.graph.input[0].type.denotation = "IMAGE"
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        why = " ".join(str(error).split())[:200]
        raise NotExportable(
            f"the graph is no valid ONNX: {why}", "try another --opset, or leave --half or --int8 out"
        ) from error
    return model.SerializeToString()

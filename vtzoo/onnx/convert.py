"""A network of torch as an ONNX graph: dynamic batch, one file, one input, one output, of a given operator set.

torch's exporter translates to operator set 18 and newer; 17 is made of 18 (see `older`). Attention goes into the graph as products and a
softmax: torch's fused form the exporter can't always translate (BEiT, MaxViT, Hiera), and onnxruntime is no faster with it.
The exporter's notes on every node, which name files of this machine, are left out.
"""

import re
from ast import literal_eval
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtzoo.errors import NotExportable, UsageError
from vtzoo.onnx import older
from vtzoo.onnx._quiet import quiet
from vtzoo.onnx.describe import INPUT

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS, OPSET = range(17, 24), 18
HINT = "choose another method or backbone, or fold or distil it"
_SCOPES = "pkg.torch.onnx.name_scopes"
MOST_BYTES = 2**31 - 2**26
"""What protobuf holds in one message, less some room for the graph."""


def check_opset(opset: int) -> None:
    """Refuse an operator set that the exporter doesn't write.

    Raises:
        UsageError: says which it does.
    """
    if opset not in OPSETS:
        known = f"{OPSETS[0]} to {OPSETS[-1]}"
        raise UsageError(
            f"operator set {opset} is none of {known}", f"leave --opset out for {OPSET}, or choose {known}"
        )


def convert(
    network: nn.Module, size: tuple[int, int, int], *, opset: int = OPSET, output: str = "logits", dynamic_size: bool = False
) -> "ModelProto":  # fmt: skip
    """Translate a network in evaluation mode.

    Args:
        network: of one input and one output.
        size: of an image, [channels, height, width].
        opset: ONNX operator set.
        output: the output's name.
        dynamic_size: leave height and width free, too.

    Raises:
        NotExportable: the exporter's own reason.
    """
    free = torch.export.Dim
    shapes: dict[int, Any] = {0: free("batch")} | ({2: free.DYNAMIC, 3: free.DYNAMIC} if dynamic_size else {})
    hint = "leave --dynamic-size out" if dynamic_size else HINT
    return translated(network, (torch.zeros(2, *size),), (shapes,), [INPUT], output, opset, hint)


def translated(
    network: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...], inputs: Sequence[str], output: str,
    opset: int = OPSET, hint: str = HINT,
) -> "ModelProto":  # fmt: skip
    """Translate a network of several inputs, the first of which are the images.

    Args:
        network: is put into evaluation mode.
        args: an example of its input.
        shapes: which of their axes are free, as `torch.export` wants it told.
        inputs: their names, one a tensor.
        output: the output's name.
        opset: ONNX operator set.
        hint: what to do where it can't be translated.

    Raises:
        NotExportable: it is too large, or the exporter's own reason.
    """
    bytes_ = sum({t.data_ptr(): t.numel() * t.element_size() for t in network.state_dict().values()}.values())
    if bytes_ > MOST_BYTES:
        raise NotExportable(f"ONNX keeps 2 GB in one file, this network has {bytes_ / 1e9:.1f} GB", "distil it first")
    with quiet(), _plain_attention(network), _explained(hint):
        program = torch.onnx.export(
            network.eval(), args, dynamo=True, external_data=False, opset_version=max(opset, older.NEW),
            input_names=inputs, output_names=[output], dynamic_shapes=shapes, verbose=False,
        )  # fmt: skip
        assert program is not None  # the old exporter's answer
    model = program.model_proto
    if opset < older.NEW:
        older.lowered(model)
    _named(model, ("batch", "height", "width"))
    _bare(model)
    return model


def _named(model: "ModelProto", axes: Sequence[str]) -> None:
    """Call nodes by the module that they come from, and free axes by what they are."""
    graph, seen = model.graph, Counter[str]()
    for node in graph.node:
        scopes = next((literal_eval(p.value) for p in node.metadata_props if p.key == _SCOPES), [""])
        place = "/".join((*(s for s in scopes[-2:-1] if s and s[0] != "_"), node.op_type))
        seen[place] += 1
        node.name = place if seen[place] == 1 else f"{place}_{seen[place]}"
    free = [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim if d.dim_param]
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            for old, new in zip(free, axes, strict=False):
                if dim.dim_param:
                    dim.dim_param = re.sub(rf"\b{re.escape(old)}\b", new, dim.dim_param)


def _bare(model: "ModelProto") -> None:
    """Without notes, and readable for runtimes as old as the operator set."""
    from onnx import helper

    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
        noted.doc_string = ""
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)


@contextmanager
def _plain_attention(network: nn.Module) -> Generator[None, None, None]:
    """timm's attentions step by step; afterwards as they were."""
    fused = [m for m in network.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment] - a plain attribute of timm modules
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment] - as above


@contextmanager
def _explained(hint: str) -> Generator[None, None, None]:
    """The exporter's refusals as ours; what is none of them keeps its traceback."""
    from torch.onnx.errors import OnnxExporterError

    try:
        yield
    except OnnxExporterError as error:
        raise NotExportable(f"torch's exporter can't translate this network: {first_line(error)}", hint) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error comes from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]

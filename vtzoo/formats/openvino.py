"""OpenVINO: its own pair of files, the graph in .xml and the weights in .bin beside it, made of ONNX.

What the file says of itself stands in the .xml, by the keys of `vtzoo.onnx.describe`:

    model = openvino.Core().read_model("m.xml")
    classes = json.loads(model.get_rt_info(["vtzoo", "classes"]).value)

On processors that multiply bfloat16 OpenVINO rounds to it unless told otherwise: compile the model with {"INFERENCE_PRECISION_HINT": "f32"},
as is done here, for the numbers of the network.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtzoo.errors import Corrupt, NotExportable
from vtzoo.onnx.convert import convert, first_line
from vtzoo.onnx.pixels import embed
from vtzoo.shipped import Begin
from vtzoo.spec import Preprocess

if TYPE_CHECKING:
    import openvino

PARTS, PACKAGES = (".xml", ".bin"), ("openvino", "onnx", "onnxscript", "torch", "timm")
FOLDER = "vtzoo"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def write(
    network: nn.Module, shape: Preprocess, size: tuple[int, int, int], metadata: Mapping[str, str], *, embedded: bool, dynamic_size: bool,
    half: bool = False,
) -> dict[str, bytes]:  # fmt: skip
    """The files' contents; with `half` weights are kept in float16, and computed with in what the machine does best.

    Raises:
        NotExportable: the exporter's or OpenVINO's own reason.
    """
    import openvino

    graph = convert(network, size, dynamic_size=dynamic_size)
    if embedded:
        embed(graph, shape)
    try:
        model = openvino.Core().read_model(graph.SerializeToString())
    except RuntimeError as error:
        raise NotExportable(f"OpenVINO can't read this network: {_reason(error)}", "choose another format") from error
    for key, value in metadata.items():
        model.set_rt_info(value, [*_place(key)])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=half)
        return {part: path.with_suffix(part).read_bytes() for part in PARTS}


def load(files: Mapping[str, Path]) -> tuple[Begin, dict[str, str]]:
    """What runs, and what the file says of itself.

    Raises:
        Corrupt: OpenVINO can't read or run it.
    """
    import openvino

    path, weights = (files[part] for part in PARTS)
    with path.open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # OpenVINO would try its other readers
            raise Corrupt(f"OpenVINO can't run {path}: it is no XML", "export it again, or fetch both files again")
    try:
        core = openvino.Core()
        model = core.read_model(str(path), str(weights))
        made = core.compile_model(model, "CPU", {**EXACT, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    except RuntimeError as error:
        raise Corrupt(
            f"OpenVINO can't run {path}: {_reason(error)}", "export it again, or fetch both files again"
        ) from error
    request = made.create_infer_request()

    def begin(images: Tensor, _tasks: Tensor | None) -> Any:
        given = images.numpy()
        return lambda: request.infer([given], share_inputs=True)[0]

    return begin, _said(model)


def _place(key: str) -> tuple[str, str]:
    """Where a key of the metadata stands: "vtzoo.classes" in vtzoo, ONNX's "Image.…" in Image."""
    folder, _, name = key.partition(".")
    return folder, name


def _said(model: "openvino.Model") -> dict[str, str]:
    if not model.has_rt_info([FOLDER]):
        return {}
    names = list(model.rt_info[FOLDER])
    return {f"{FOLDER}.{name}": str(model.get_rt_info([FOLDER, name]).value) for name in names}


def _reason(error: RuntimeError) -> str:
    """OpenVINO's last line that isn't where in its source it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Exception from ")), first_line(error))[:200]

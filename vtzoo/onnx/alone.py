"""Whether an ONNX file is all there is: tensors may say that they lie in another file, anywhere on the reader's disk."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtzoo.errors import Corrupt
from vtzoo.files import explained

_KEY = b"location"
"""Of the place of a tensor that is elsewhere; a file without this word has none."""


def check_alone(path: Path) -> None:
    """Refuse a file that would make its reader open others; the graph is parsed where it may.

    Raises:
        Corrupt: it does, or can't be parsed.
    """
    with explained(path, "read"), path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_KEY) < 0:
                return
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise Corrupt(f"{path} is no ONNX file", "export it again, or fetch it again") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            said = f"{path} is not all in one file: it would have its reader open others"
            raise Corrupt(said, "use a file that vtzoo export onnx wrote")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, wherever it stands."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _tensors(part)

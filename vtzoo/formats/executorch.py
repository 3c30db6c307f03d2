"""ExecuTorch: a program for phones and small devices, its products on XNNPACK.

What the file says of itself is a method of the program that gives JSON as bytes, by the keys of `vtzoo.onnx.describe`:

    program = executorch.runtime.Runtime.get().load_program("m.pte")
    said = json.loads(bytes(program.load_method("vtzoo").execute([])[0].numpy()))

Memory is planned when the file is made, so a batch has a largest size, `vtzoo.max_batch`; larger ones are run in pieces.
"""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import strict
from vtzoo.errors import Corrupt, NotExportable
from vtzoo.formats._program import exported
from vtzoo.onnx._quiet import quiet
from vtzoo.onnx.convert import HINT, first_line
from vtzoo.shipped import Begin
from vtzoo.spec import Preprocess

PARTS, PACKAGES = (".pte",), ("executorch", "torch", "timm")
SAID, MOST = "vtzoo", "vtzoo.max_batch"


def write(
    network: nn.Module, shape: Preprocess, size: tuple[int, int, int], metadata: Mapping[str, str], *, embedded: bool, dynamic_size: bool,
    max_batch: int = 8,
) -> dict[str, bytes]:  # fmt: skip
    """The file's content.

    Raises:
        NotExportable: torch.export's or ExecuTorch's own reason.
    """
    program = exported(network, shape, size, embedded=embedded, dynamic_size=dynamic_size, most=max_batch)
    text = json.dumps({**metadata, MOST: str(max_batch)}).encode()
    said = {SAID: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    with quiet(), _silent():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.passes.constant_prop_pass import constant_prop_pass

        try:
            program = constant_prop_pass(program)  # what doesn't depend on images, such as a resized position embedding
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=said)
            return {PARTS[0]: bytes(lowered.to_executorch().buffer)}
        except Exception as error:  # its passes have no root of their own
            raise NotExportable(f"ExecuTorch can't translate this network: {first_line(error)}", HINT) from error


def load(files: Mapping[str, Path]) -> tuple[Begin, dict[str, str]]:
    """What runs, and what the file says of itself.

    Raises:
        Corrupt: ExecuTorch can't read or run it.
    """
    path = files[PARTS[0]]
    try:
        with quiet(), _silent():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._unsafe_reset_threadpool(torch.get_num_threads())  # noqa: SLF001 - it has no other name
            program = Runtime.get().load_program(path.read_bytes())
            forward = program.load_method("forward")
            said: Any = program.load_method(SAID) if SAID in program.method_names else None
            metadata = dict(strict.record(bytes(said.execute([])[0].numpy()))) if said else {}
            most = int(metadata.get(MOST, 1))
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # of damage, and of what others call so
        raise Corrupt(
            f"ExecuTorch can't run {path}: {first_line(error)}", "export it again, or fetch it again"
        ) from error
    assert forward is not None
    held = (program, forward)  # the method's memory is the program's, and goes with it

    def begin(images: Tensor, _tasks: Tensor | None) -> Any:
        return lambda: torch.cat([held[1].execute([part])[0].clone() for part in images.split(most)])

    return begin, metadata


def _silent() -> redirect_stderr[io.StringIO]:
    """What the runtime says of the processor while it starts goes nowhere."""
    return redirect_stderr(io.StringIO())

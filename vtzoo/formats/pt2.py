"""PT2: torch's archive of a traced program, which torch alone loads and runs, compiles or gives to other back ends (torch.export.save).

What the file says of itself is JSON in the archive, by the keys of `vtzoo.onnx.describe`:

    said = {"vtzoo.json": ""}
    network = torch.export.load("m.pt2", extra_files=said).module()

Opening an archive of a stranger could run anything, so what it holds is checked first (see `_plain`): a program of torch's operators and plain tensors are all
that there may be.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from vtzoo import strict
from vtzoo.errors import Corrupt
from vtzoo.formats._plain import check_plain, check_stored
from vtzoo.formats._program import exported
from vtzoo.onnx._quiet import quiet
from vtzoo.onnx.convert import first_line
from vtzoo.shipped import Begin
from vtzoo.spec import Preprocess

PARTS, PACKAGES = (".pt2",), ("torch", "timm")
SAID = "vtzoo.json"


def write(
    network: nn.Module, shape: Preprocess, size: tuple[int, int, int], metadata: Mapping[str, str], *, embedded: bool, dynamic_size: bool
) -> dict[str, bytes]:  # fmt: skip
    """The file's content.

    Raises:
        NotExportable: torch.export's own reason.
    """
    program, file = exported(network, shape, size, embedded=embedded, dynamic_size=dynamic_size), io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={SAID: json.dumps(dict(metadata))})
    return {PARTS[0]: file.getvalue()}


def load(files: Mapping[str, Path]) -> tuple[Begin, dict[str, str]]:
    """What runs, and what the file says of itself.

    Raises:
        Corrupt: it is no such archive, or holds something pickled.
    """
    path = files[PARTS[0]]
    check_stored(path)
    try:
        with quiet(), path.open("rb") as file:
            check_plain(PT2ArchiveReader(file), path)
            file.seek(0)
            found = load_pt2(file)  # torch.export.load reads what it fails to read a second way, which unpickles
        network = found.exported_programs["model"].module(check_guards=False)  # guards are run as source
        metadata = dict(strict.record(found.extra_files.get(SAID, "{}")))
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        SpecViolationError,
    ) as error:  # what torch raises of damage
        raise Corrupt(f"{path} is no archive that torch can run: {first_line(error)}", "export it again") from error

    def begin(images: Tensor, _tasks: Tensor | None) -> Any:
        return lambda: network(images)

    return begin, metadata

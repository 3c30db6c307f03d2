"""PT2: torch's archive of a traced program, which torch alone loads and runs, compiles or gives to other back ends (torch.export.save).

What the file says of itself is JSON in the archive, by the keys of `vtzoo.onnx.describe`:

    said = {"vtzoo.json": ""}
    network = torch.export.load("m.pt2", extra_files=said).module()

torch unpickles what an archive holds pickled, so such archives are refused before torch opens them: a program and plain tensors are all
that there may be.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.errors import Corrupt
from vtzoo.formats._program import exported
from vtzoo.onnx._quiet import quiet
from vtzoo.shipped import Begin
from vtzoo.spec import Preprocess

PARTS, PACKAGES = (".pt2",), ("torch", "timm")
SAID = "vtzoo.json"
_PLAIN = ("weight_", "tensor_")
_FOLDERS = ("data/weights/", "data/constants/", "data/sample_inputs/", "models/", "extra/", ".data/")
_FILES = ("archive_format", "archive_version", "version", "byteorder")


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
    path, said = files[PARTS[0]], {SAID: ""}
    try:
        check_plain(path)
        with quiet(), path.open("rb") as file:
            network = torch.export.load(file, extra_files=said).module()
        metadata = json.loads(said[SAID] or "{}")
    except (
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        KeyError,
        AssertionError,
    ) as error:  # what torch raises of damage
        raise Corrupt(f"{path} is no archive that torch can run: {str(error)[:200]}", "export it again") from error

    def begin(images: Tensor, _tasks: Tensor | None) -> Any:
        return lambda: network(images)

    return begin, metadata


def check_plain(path: Path) -> None:
    """Refuse an archive of anything but a program, plain tensors and texts.

    Raises:
        Corrupt: says what it holds.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inside = name.partition("/")[2]
            if not (inside in _FILES or inside.startswith(_FOLDERS)):
                raise _strange(path, inside)
            content = archive.read(name) if inside.endswith((".json", ".pt")) else b""
            if inside.startswith("data/sample_inputs/"):
                _check_inputs(path, inside, content)
            elif inside.endswith("_config.json"):
                _check_tensors(path, inside, json.loads(content))
            elif inside.endswith(".pt") or (inside.startswith("data/") and not _plain(inside)):
                raise _strange(path, inside)


def _plain(inside: str) -> bool:
    return inside.rpartition("/")[2].startswith(_PLAIN)


def _check_tensors(path: Path, inside: str, config: Mapping[str, Any]) -> None:
    for payload in config.get("config", {}).values():
        if payload.get("use_pickle") is not False or not str(payload.get("path_name")).startswith(_PLAIN):
            raise _strange(path, inside)


def _check_inputs(path: Path, inside: str, content: bytes) -> None:
    """torch tries to read these as plain tensors, and unpickles what is none."""
    import pickle

    try:
        with quiet():
            torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _strange(path, inside) from error


def _strange(path: Path, inside: str) -> Corrupt:
    what = "holds something else than a program and plain tensors, which could run anything when loaded"
    return Corrupt(f"{path} {what}: {inside}", "use a file that vtzoo export pt2 wrote, with a recent torch")

"""Files for other runtimes beside ONNX, one kind a file: how each is written, and how it runs. The file's stem is its name."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vtzoo.errors import Corrupt, Mismatch, UsageError
from vtzoo.files import reading
from vtzoo.onnx.convert import first_line
from vtzoo.onnx.describe import Description, check_task, read
from vtzoo.refs import EXPORTS
from vtzoo.shipped import Shipped

KINDS = tuple(kind for kind in EXPORTS.values() if kind != "onnx")


def of(form: str) -> Any:
    """A kind's module, its package seen to be installed.

    Raises:
        UsageError: it is not, and how to get it; or there is no such kind.
    """
    if form not in KINDS:
        raise UsageError(f"no kind of file is called '{form}'", f"choose of {', '.join(KINDS)}")
    try:
        made = _module(form)
        import_module(made.PACKAGES[0])
    except ImportError as error:
        how = "pip install --upgrade torch" if form == "pt2" else f"pip install 'vtzoo[{form}]'"
        raise UsageError(f"{form} files need the package {error.name}", how) from error
    return made


def opened(form: str, files: Mapping[str, Path], task: str | None = None) -> tuple[Shipped, Description]:
    """Open a file, or those that belong together, as something that runs, with what it says of itself.

    Args:
        form: its kind.
        files: by suffix.
        task: must be its own, if given.

    Raises:
        NotFound: a file is missing, or the task is another.
        Corrupt: it can't be read or run.
        Mismatch: it doesn't say how to use it, or gives something else.
    """
    made, path = of(form), next(iter(files.values()))
    for file in files.values():
        with reading(file), file.open("rb"):
            pass
    begin, metadata = made.load(files)
    description = read(metadata, str(path))
    check_task(description, task, str(path))
    runtime = Shipped(form, begin, description.preprocess, embedded=description.embedded)
    _check_answer(runtime, description, path)
    return runtime, description


def metadata(path: Path) -> dict[str, str]:
    """What an exported file of any kind says of itself, by keys without "vtzoo." before them; its runtime reads it.

    Raises:
        UsageError: the runtime is not installed.
        Corrupt: the file can't be read.
        Mismatch: it says nothing of its classes and input.
    """
    form = EXPORTS[path.suffix]
    if form == "onnx":
        from vtzoo.onnx.run import session

        said = session(path, str(path)).get_modelmeta().custom_metadata_map
    else:
        _, said = of(form).load(beside(path, form))
    return {k: str(v) for k, v in read(said, str(path)).facts.items()}


def beside(path: Path, form: str) -> dict[str, Path]:
    """The files that belong to the one that is named."""
    parts = (".onnx",) if form == "onnx" else _module(form).PARTS
    return {part: path if part == parts[0] else path.with_suffix(part) for part in parts}


def _check_answer(runtime: Shipped, said: Description, path: Path) -> None:
    """Run one image of zeros, and count what comes out.

    Raises:
        Corrupt: it doesn't take such an image.
        Mismatch: there are not as many outputs as classes.
    """
    hint = "use a file that vtzoo export wrote"
    try:
        with torch.inference_mode():
            outputs = runtime(torch.zeros(1, *said.preprocess.input_size)).shape[1]
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AssertionError,
    ) as error:  # what runtimes raise of an input
        size = "x".join(map(str, said.preprocess.input_size))
        raise Corrupt(
            f"{path} doesn't take an image of {size}, as its metadata say: {first_line(error)}", hint
        ) from error
    if said.task and outputs != len(said.task.classes):
        raise Mismatch(f"{path} gives {outputs} outputs, its metadata name {len(said.task.classes)} classes", hint)


def _module(form: str) -> Any:
    return import_module(f"{__name__}.{form}")

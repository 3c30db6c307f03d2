"""Files for other runtimes beside ONNX, one kind a file: how each is written, and how it runs. The file's stem is its name."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vtzoo.errors import NotFound, UsageError
from vtzoo.files import reading
from vtzoo.onnx.describe import Description, read
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
    made = _module(form)
    try:
        import_module(made.PACKAGES[0])
    except ImportError as error:
        raise UsageError(f"{form} files need the package {error.name}", f"pip install 'vtzoo[{form}]'") from error
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
        Mismatch: it doesn't say how to use it.
    """
    made, path = of(form), next(iter(files.values()))
    for file in files.values():
        with reading(file), file.open("rb"):
            pass
    begin, metadata = made.load(files)
    description = read(metadata, str(path))
    check_task(description, task, path)
    return Shipped(form, begin, description.preprocess, embedded=description.embedded), description


def beside(path: Path, form: str) -> dict[str, Path]:
    """The files that belong to the one that is named."""
    parts = (".onnx",) if form == "onnx" else _module(form).PARTS
    return {part: path if part == parts[0] else path.with_suffix(part) for part in parts}


def check_task(description: Description, task: str | None, path: Path) -> None:
    """Refuse another task than the file's own.

    Raises:
        NotFound: says whose it is.
    """
    one = description.task
    if task and (one is None or one.name != task):
        raise NotFound(f"{path} has no task '{task}'", f"leave --task out: its task is '{one.name if one else ''}'")


def _module(form: str) -> Any:
    return import_module(f"{__name__}.{form}")

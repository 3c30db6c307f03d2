"""Run an ONNX file with onnxruntime where a network of torch would stand: images in, logits out."""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtzoo.errors import Corrupt, Mismatch, UsageError
from vtzoo.files import reading
from vtzoo.onnx.alone import check_alone
from vtzoo.onnx.describe import INPUT, TASK_ID, Description, check_task, read
from vtzoo.shipped import Shipped
from vtzoo.spec import Preprocess, chosen

if TYPE_CHECKING:
    import onnxruntime

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
WARM, SECONDS, MOST = 2, 1.0, 50
"""Of a latency: runs that don't count, after how many seconds no more are begun, and how many are enough."""


def require(*packages: str) -> None:
    """Refuse at once where a package is missing.

    Raises:
        UsageError: says which, and how to get it.
    """
    for needed in packages or PACKAGES:
        try:
            import_module(needed)
        except ImportError as error:
            raise UsageError(f"ONNX needs {error.name}", "pip install 'vtzoo[onnx]'") from error


class Runtime(Shipped):
    """A session that is called as the network it was made from; see `Shipped`."""

    def __init__(
        self, session: "onnxruntime.InferenceSession", preprocess: Preprocess, *, embedded: bool, task: int = 0, classes: int | None = None,
    ) -> None:  # fmt: skip
        several, name = len(session.get_inputs()) > 1, session.get_inputs()[0].name

        def begin(images: Tensor, tasks: Tensor | None) -> Callable[[], Any]:
            feed = {name: images.numpy(), **({TASK_ID: tasks.numpy()} if tasks is not None else {})}
            return lambda: session.run(None, feed)[0]

        super().__init__("onnx", begin, preprocess, embedded=embedded, task=task if several else None, classes=classes)


def session(source: bytes | Path, where: str = "") -> "onnxruntime.InferenceSession":
    """A session on the processor with as many threads as torch uses.

    Args:
        source: the file or its bytes.
        where: what to call it in a message.

    Raises:
        Corrupt: onnxruntime can't read or run it.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    given = source if isinstance(source, bytes) else str(source)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no root of their own
        if not (why := reason(error)):
            raise
        raise Corrupt(f"onnxruntime can't run {where or 'it'}: {why}", "export it again, or fetch it again") from error


def reason(error: BaseException) -> str:
    """What one of onnxruntime's own errors says, in a line; "" where it is none of them."""
    text = str(error)
    if not text.startswith("[ONNXRuntimeError]"):
        return ""
    return " ".join(text.split(" : ", 3)[-1].split())[:200]


def open_onnx(path: Path, task: str | None = None) -> tuple[Runtime, Description]:
    """Open an exported file as something that runs, with what it says of itself; of many tasks for one, which becomes `task`.

    Raises:
        NotFound: there is no such file, or no such task in it, or several and none named.
        Corrupt: it can't be read or run.
        Mismatch: it says nothing of its classes and input.
    """
    with reading(path), path.open("rb"):
        pass
    check_alone(path)
    made = session(path, str(path))
    description = read(made.get_modelmeta().custom_metadata_map, str(path))
    _check_ports(made, description, path)
    if not description.tasks:
        one, number = description.task, 0
    else:
        tasks = [t for t, _ in description.tasks]
        one = chosen(tasks, task, str(path))
        number = tasks.index(one)
    check_task(replace(description, task=one), task, str(path))
    classes = len(one.classes) if one and description.tasks else None
    runtime = Runtime(made, description.preprocess, embedded=description.embedded, task=number, classes=classes)
    return runtime, replace(description, task=one)


def _check_ports(made: "onnxruntime.InferenceSession", description: Description, path: Path) -> None:
    wanted = {INPUT: "tensor(uint8)" if description.embedded else "tensor(float)"}
    wanted |= {TASK_ID: "tensor(int64)"} if description.tasks else {}
    ports = made.get_inputs()
    if [p.type for p in ports] != [*wanted.values()] or [p.name for p in ports[1:]] != [*wanted][1:]:
        found, said = (
            ", ".join(f"{n} {t}" for n, t in given) for given in ([(p.name, p.type) for p in ports], wanted.items())
        )
        raise Mismatch(f"{path} takes {found}, its metadata say {said}", "use a file that vtzoo export onnx wrote")
    every = [t for t, _ in description.tasks] or ([description.task] if description.task else [])
    most, shape = max((len(t.classes) for t in every), default=0), made.get_outputs()[0].shape
    if most and isinstance(shape[-1], int) and shape[-1] != most:
        raise Mismatch(
            f"{path} gives {shape[-1]} outputs, its metadata name {most} classes",
            "use a file that vtzoo export onnx wrote",
        )


def latencies(*runs: Callable[[], object]) -> list[float]:
    """The median time of a call of each, in milliseconds; they take turns, so that what else the machine does meets all alike."""
    taken: list[list[float]] = [[] for _ in runs]
    until = time.perf_counter() + SECONDS
    while len(taken[0]) < WARM + MOST and (len(taken[0]) <= WARM or time.perf_counter() < until):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [1000 * median(times[WARM:]) for times in taken]

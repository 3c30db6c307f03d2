"""Run an ONNX file with onnxruntime where a network of torch would stand: images in, logits out."""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtzoo.errors import Corrupt, Mismatch, UsageError
from vtzoo.files import reading
from vtzoo.onnx.describe import Description, read
from vtzoo.spec import Preprocess

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


class Runtime(nn.Module):
    """A session that is called as the network it was made from: normalised float32 [n, 3, h, w] in, float32 [n, outputs] out.

    Where the file takes pictures, they are made again of the normalised values: these were whole numbers from 0 to 255, so
    rounding gives back the very ones.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", preprocess: Preprocess, *, embedded: bool) -> None:
        super().__init__()
        self.session, self.embedded, self.name = session, embedded, session.get_inputs()[0].name
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or features of a backbone without a head."""
        return torch.from_numpy(self.bare(x)()).float()

    def bare(self, x: Tensor) -> Callable[[], Any]:
        """The session's own run on these images, ready to be called: what its time is measured by."""
        given = _pictures(x, self.mean, self.std) if self.embedded else x.float().contiguous()
        feed = {self.name: given.numpy()}
        return lambda: self.session.run(None, feed)[0]


def _pictures(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised [n, 3, h, w] back to uint8 [n, h, w, 3]."""
    return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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


def open_onnx(path: Path) -> tuple[Runtime, Description]:
    """Open an exported file as something that runs, with what it says of itself.

    Raises:
        NotFound: there is no such file.
        Corrupt: it can't be read or run.
        Mismatch: it says nothing of its classes and input.
    """
    with reading(path), path.open("rb"):
        pass
    made = session(path, str(path))
    description = read(made.get_modelmeta().custom_metadata_map, str(path))
    ports = made.get_inputs()
    wanted = "tensor(uint8)" if description.embedded else "tensor(float)"
    if len(ports) != 1 or ports[0].type != wanted:
        found = ", ".join(f"{p.name} {p.type}" for p in ports)
        raise Mismatch(f"{path} takes {found}, its metadata say {wanted}", "use a file that vtzoo export onnx wrote")
    return Runtime(made, description.preprocess, embedded=description.embedded), description


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

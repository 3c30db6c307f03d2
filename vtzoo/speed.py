"""How fast a network is in each form: torch attached, torch folded, other runtimes; threads pinned, forms in turns."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vtzoo import formats
from vtzoo.onnx.convert import convert
from vtzoo.onnx.run import Runtime, latencies, session
from vtzoo.shipped import Shipped
from vtzoo.spec import Preprocess


@contextmanager
def pinned(threads: int) -> Generator[int]:
    """Compute with so many threads (0: as many as torch takes), torch and sessions that are made inside; gives how many."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def in_onnx(model: nn.Module, shape: Preprocess) -> Runtime:
    """A network as onnxruntime runs it, never written to a file.

    Raises:
        NotExportable: the exporter's own reason.
        UsageError: the onnx extra is not installed.
    """
    content = convert(model, shape.input_size).SerializeToString()
    return Runtime(session(content), shape, embedded=False)


def in_format(form: str, model: nn.Module, shape: Preprocess) -> Shipped:
    """A network as another runtime runs it: pt2, openvino, executorch.

    Raises:
        NotExportable: the exporter's own reason.
        UsageError: its package is not installed.
    """
    made = formats.of(form)
    content = made.write(model, shape, shape.input_size, {}, embedded=False, dynamic_size=False)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a system may hold what is mapped into memory
        files = {suffix: Path(folder) / f"model{suffix}" for suffix in content}
        for suffix, data in content.items():
            files[suffix].write_bytes(data)
        return Shipped(form, made.load(files)[0], shape, embedded=False)


@torch.inference_mode()
def timed(forms: Mapping[str, nn.Module], size: tuple[int, int, int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds a call (the median; the forms take turns) and images a second, by form and batch size.

    Args:
        forms: networks in evaluation mode, or what runs as one.
        size: of an image, [channels, height, width].
        batches: sizes.
    """
    found: list[dict[str, Any]] = []
    for batch in batches:
        x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
        times = latencies(*(_call(form, x) for form in forms.values()))
        found += [
            {"form": name, "batch": batch, "ms": round(ms, 3), "images_per_s": round(1000 * batch / ms, 1)}
            for name, ms in zip(forms, times, strict=True)
        ]
    return found


def _call(form: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return form.bare(x) if isinstance(form, Shipped) else lambda: form(x)

"""Ship a model as PT2, OpenVINO or ExecuTorch, verified in its own runtime before the file appears."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtzoo import formats, talk
from vtzoo.artifact import Live, open_ref
from vtzoo.errors import Mismatch
from vtzoo.files import atomic_write
from vtzoo.onnx.describe import written
from vtzoo.onnx.looks import looks
from vtzoo.onnx.verify import TOLERANCES
from vtzoo.results import Exported
from vtzoo.verbs.export._origin import check_place, keep, origin
from vtzoo.verbs.export._ship import Seen, described, other_size, ready_to_ship, verified
from vtzoo.zoo import Zoo

HINT = "export it as ONNX, or pass a larger --tolerance knowingly"


def export_program(
    *, form: str, ref: str, out: Path, tolerance: float | None = None, task: str | None = None, dynamic_size: bool = False,
    embed_preprocess: bool = False, data: str | None = None, zoo: Zoo | None = None, name: str | None = None, **more: Any,
) -> Exported:  # fmt: skip
    """Export a delta (folded where it folds, else attached), merge, folded model, student or bare backbone.

    Args:
        form: pt2, openvino or executorch.
        ref: what to export.
        out: the file, of OpenVINO the .xml; it appears only when its outputs were verified at batch sizes 1, 2 and 5.
        tolerance: the largest allowed difference, relative to the largest output (1e-3 unless given); of float16 weights how far
            the mean cosine of the outputs may stand below 1 (1e-3).
        task: whose head, where there are several.
        dynamic_size: take images of other heights and widths, too.
        embed_preprocess: take uint8 pictures [n, h, w, 3] at the network's size and normalise in the program.
        data: images to verify with; their labels don't matter.
        zoo: where to look.
        name: also keep the file in the zoo.
        more: what this kind of file takes besides: openvino `half`, executorch `max_batch`.

    Returns:
        `report`: differences by batch and over all, cosine, top-1 agreement, size, latency.

    Raises:
        NotExportable: the exporter can't translate the network, and why.
        ExportMismatch: the file's outputs differ by more than the tolerance.
        UsageError: a package is not installed, or a file name with another suffix.
        NotFound: the folder does not exist.
        Conflict: the file exists.
    """
    zoo, out, made = zoo or Zoo.find(), Path(out), formats.of(form)
    check_place(out, form)
    if name:
        zoo.check_free("models", name)
    artifact = open_ref(ref, zoo)
    live, attached = ready_to_ship(artifact, task, dynamic_size=dynamic_size)
    seen = looks(data, live.preprocess, 1) if data else None
    precision = "float16" if more.get("half") else "float32"
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    folded = artifact.delta is not None and not attached
    facts = origin(artifact, live.card, precision=precision, folded=folded, packages=made.PACKAGES)
    said = written(described(live, facts, embedded=embed_preprocess, dynamic_size=dynamic_size))
    size = other_size(live) if dynamic_size else live.preprocess.input_size
    content = made.write(
        live.model, live.preprocess, size, said, embedded=embed_preprocess, dynamic_size=dynamic_size, **more
    )
    report: dict[str, Any] = {
        "precision": precision, "folded": folded, **({"attached_because": attached} if attached else {}),
        "size_bytes": sum(map(len, content.values())),
    }  # fmt: skip
    with _written(formats.beside(out, form), content) as files:
        report |= _read_back(form, files, live, seen, precision, allowed, dynamic_size=dynamic_size)
        if name:
            keep(zoo, name, content, live.card, [live.task.name] if live.task else [], [artifact.digest], report)
    talk.say(f"exported {out}: largest relative difference {report['max_rel']:.1e}")
    return Exported(ref=name or artifact.ref, path=str(out), report=report)


@contextmanager
def _written(places: Mapping[str, Path], content: Mapping[str, bytes]) -> Generator[dict[str, Path]]:
    """All files under other names, which become theirs when the block ends well: the one that is named appears last."""
    with ExitStack() as stack:
        files: dict[str, Path] = {}
        for suffix, place in places.items():
            file = stack.enter_context(atomic_write(place))
            file.write(content[suffix])
            file.flush()
            files[suffix] = Path(file.name)
        yield files


def _read_back(
    form: str, files: Mapping[str, Path], live: Live, seen: Seen, precision: str, allowed: float, *, dynamic_size: bool
) -> dict[str, Any]:  # fmt: skip
    """What the files answer when they are opened as any others."""
    runtime, said = formats.opened(form, files)
    task = live.task and replace(live.task, words=(), templates=())  # which no file is told
    if said.task != task or said.preprocess != live.preprocess:
        raise Mismatch(f"the {form} file doesn't say what its outputs are", "report it, with the command")
    return verified(live, runtime, seen, precision, allowed, who=form, hint=HINT, dynamic_size=dynamic_size)

"""Ship a model as ONNX, verified with onnxruntime before the file appears."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtzoo import talk
from vtzoo.artifact import Live, open_ref
from vtzoo.errors import UsageError
from vtzoo.files import atomic_write
from vtzoo.onnx import precision, verify
from vtzoo.onnx.convert import OPSET, convert
from vtzoo.onnx.describe import written
from vtzoo.onnx.half import halved
from vtzoo.onnx.looks import CALIBRATE, looks
from vtzoo.onnx.pixels import embed
from vtzoo.onnx.run import Runtime, session
from vtzoo.onnx.seal import seal
from vtzoo.results import Exported
from vtzoo.verbs.export._origin import keep, origin, ready
from vtzoo.verbs.export._ship import Seen, described, other_size, ready_to_ship, verified
from vtzoo.zoo import Zoo

if TYPE_CHECKING:
    from onnx import ModelProto

Int8 = Literal["dynamic", "static"]
HINT = "try another --opset, or pass a larger --tolerance knowingly"
WEIGHED = 8
"""How many images weigh each layer where not all may be int8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What kind of file is wanted; see `export_onnx`."""

    opset: int = OPSET
    dynamic_size: bool = False
    embedded: bool = False
    half: bool = False
    int8: Int8 | None = None
    tolerance: float | None = None

    @property
    def precision(self) -> str:
        """The numbers inside."""
        return "int8" if self.int8 else "float16" if self.half else "float32"

    @property
    def allowed(self) -> float:
        """The tolerance that holds."""
        return verify.TOLERANCES[self.precision] if self.tolerance is None else self.tolerance


def export_onnx(
    *, ref: str, out: Path, opset: int | None = None, tolerance: float | None = None, task: str | None = None,
    dynamic_size: bool = False, embed_preprocess: bool = False, half: bool = False, int8: Int8 | None = None,
    data: str | None = None, calibrate: int | None = None, zoo: Zoo | None = None, name: str | None = None,
) -> Exported:  # fmt: skip
    """Export a delta (folded where it folds, else attached), merge, folded model, student or bare backbone.

    Args:
        ref: what to export.
        out: the file; it appears only when its outputs were verified at batch sizes 1, 2 and 5.
        opset: ONNX operator set, 17 to 23; 18 unless given.
        tolerance: in float32 the largest allowed difference, relative to the largest output (1e-3 unless given); in float16 and
            int8 how far the mean cosine of the outputs may stand below 1 (1e-3 and 1e-2).
        task: whose head, where there are several.
        dynamic_size: take images of other heights and widths, too.
        embed_preprocess: take uint8 pictures [n, h, w, 3] at the network's size and normalise in the graph.
        half: float16 inside.
        int8: int8 inside, with ranges of activations found as they come (dynamic) or on images (static).
        data: images to verify with and to find ranges on; their labels don't matter.
        calibrate: how many of them find ranges, 100 unless given.
        zoo: where to look.
        name: also keep the file in the zoo.

    Returns:
        `report`: differences by batch and over all, cosine, top-1 agreement, size, latency, and what was done.

    Raises:
        NotExportable: the exporter can't translate the network, and why.
        ExportMismatch: onnxruntime's outputs differ by more than the tolerance.
        UsageError: the onnx extra is not installed, or options that don't go together.
        Conflict: the file exists.
    """
    zoo, out = zoo or Zoo.find(), Path(out)
    wish = Wish(
        opset=OPSET if opset is None else opset, dynamic_size=dynamic_size, embedded=embed_preprocess, half=half, int8=int8,
        tolerance=tolerance,
    )  # fmt: skip
    _ready(out, wish, data, calibrate)
    if name:
        zoo.check_free("models", name)
    artifact = open_ref(ref, zoo)
    live, attached = ready_to_ship(artifact, task, dynamic_size=wish.dynamic_size)
    seen = looks(data, live.preprocess, calibrate or CALIBRATE) if data else None
    graph, done = _graph(live, wish, seen)
    facts = origin(artifact, live.card, precision=wish.precision, folded=artifact.delta is not None and not attached)
    said = described(live, facts, embedded=wish.embedded, dynamic_size=wish.dynamic_size)
    content = seal(graph, written(said))
    runtime = Runtime(session(content), live.preprocess, embedded=wish.embedded)
    report = {
        "precision": wish.precision + (f" {int8}" if int8 else ""), "opset": wish.opset, "folded": facts["folded"],
        **({"attached_because": attached} if attached else {}), **done,
        **verified(live, runtime, seen, wish.precision, wish.allowed, who="onnxruntime", hint=HINT, dynamic_size=wish.dynamic_size),
        "size_bytes": len(content),
    }  # fmt: skip
    with atomic_write(out) as file:
        file.write(content)
        if name:
            keep(zoo, name, {".onnx": content}, live.card, [t.name for t in (live.task,) if t], [artifact.digest], report)  # fmt: skip
    talk.say(f"exported {out}: largest relative difference {report['max_rel']:.1e}")
    return Exported(ref=name or artifact.ref, path=str(out), report=report)


def _ready(out: Path, wish: Wish, data: str | None, calibrate: int | None) -> None:
    """Refuse what can't be before anything is loaded."""
    if wish.half and wish.int8:
        raise UsageError("a file has float16 inside or int8, not both", "choose --half or --int8")
    if wish.int8 == "static" and not data:
        raise UsageError("static int8 needs images to find ranges on", "add --data DATA, or use --int8 dynamic")
    if calibrate is not None and (wish.int8 != "static" or calibrate < 1):
        raise UsageError(f"nothing is calibrated on {calibrate} images here", "use --int8 static and one image or more")
    ready(out, wish.opset)


def _graph(live: Live, wish: Wish, seen: Seen) -> tuple["ModelProto", dict[str, Any]]:
    """Translate, in the numbers that are wished."""
    size = other_size(live) if wish.dynamic_size else live.preprocess.input_size
    output = "logits" if live.task else "features"
    graph = convert(live.model, size, opset=wish.opset, output=output, dynamic_size=wish.dynamic_size)
    done: dict[str, Any] = {}
    if wish.half:
        graph = halved(graph)
    if wish.int8:
        deciding = _deciding(live, wish, seen)
        graph, done = (
            precision.dynamic(graph, deciding)
            if seen is None or wish.int8 == "dynamic"
            else precision.static(graph, seen[0], deciding)
        )
        if seen is not None and wish.int8 == "static":
            done["calibrated_on"] = f"{len(seen[0].images)} images of {seen[0].images.where}"
    if wish.embedded:
        embed(graph, live.preprocess)
    return graph, done


def _deciding(live: Live, wish: Wish, seen: Seen) -> precision.Deciding:
    noise = verify.random_pictures(live.preprocess)
    images, few = (noise, noise) if seen is None else (seen[0], seen[0].few(WEIGHED))
    return precision.Deciding(live.model, live.preprocess, images, few, wish.allowed)

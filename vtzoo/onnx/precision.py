"""A float32 graph in fewer bits, near enough to the network that it came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtzoo.errors import NotExportable
from vtzoo.onnx import fallback, int8, verify
from vtzoo.onnx.run import Runtime, session
from vtzoo.spec import Preprocess

if TYPE_CHECKING:
    from onnx import ModelProto

MARGIN = 0.75
"""Of the tolerance, what the images that decide may use up, so that others pass, too."""
LEAST = 0.5
"""Of the bytes of all weights, what int8 must reach to be worth a file."""


@dataclass(frozen=True, slots=True)
class Deciding:
    """What decides which layers become int8.

    Attributes:
        network: of torch, whose outputs are wanted.
        preprocess: of its input.
        images: batches over which a model must be near enough; gone through many times.
        few: a few of them, over which each layer is weighed.
        allowed: 1 - the mean cosine.
    """

    network: verify.Run
    preprocess: Preprocess
    images: Iterable[Tensor]
    few: Iterable[Tensor]
    allowed: float

    def over(self, images: Iterable[Tensor]) -> fallback.Apart:
        """How far a model stands from the network over images, of which the network is asked once."""
        wanted = verify.answers(self.network, images)

        def apart(model: "ModelProto") -> float:
            runtime = Runtime(session(model.SerializeToString()), self.preprocess, embedded=False)
            return verify.distance(verify.compared(wanted, runtime, images))

        return apart


def dynamic(model: "ModelProto", deciding: Deciding) -> tuple["ModelProto", dict[str, Any]]:
    """Int8 with the ranges of activations found as they come.

    Raises:
        NotExportable: most weights are in convolutions, which this form doesn't know.
        ExportMismatch: see `fallback`.
    """
    ready = int8.prepared(model)
    names = int8.layers(ready, int8.DYNAMIC)
    if (part := int8.share(ready, names)) < LEAST:
        raise NotExportable(
            f"dynamic int8 is for MatMul and Gemm, which hold {part:.0%} of this network's weights", "use --int8 static --data DATA"
        )  # fmt: skip
    return _with(ready, names, lambda chosen: int8.dynamic(ready, chosen), deciding)


def static(model: "ModelProto", seen: Iterable[Tensor], deciding: Deciding) -> tuple["ModelProto", dict[str, Any]]:
    """Int8 with the ranges of activations that images show.

    Raises:
        ExportMismatch: see `fallback`.
    """
    ready = int8.prepared(model)
    names = int8.layers(ready, int8.STATIC)
    found = int8.ranges(ready, seen)
    return _with(ready, names, lambda chosen: int8.static(ready, found, chosen), deciding)


def _with(
    ready: "ModelProto", names: Sequence[str], make: fallback.Make, deciding: Deciding
) -> tuple["ModelProto", dict[str, Any]]:
    apart, few = deciding.over(deciding.images), deciding.over(deciding.few)
    made, left = fallback.quantised(names, make, apart, few, MARGIN * deciding.allowed)
    told = {"quantised": f"{len(names) - len(left)} of {len(names)} layers"}
    return made, told | ({"in_float": _labels(ready, left)} if left else {})


def _labels(ready: "ModelProto", left: Iterable[str]) -> list[str]:
    """What torch calls the layers: by their weights, or where these were turned round, by where they stand."""
    weights = {n.name: n.input[1] for n in ready.graph.node if len(n.input) > 1}
    return [w.removesuffix(".weight") if (w := weights[n]).endswith(".weight") else n.partition("/")[0] for n in left]

"""Whether an exported file computes what the network computes: differences by batch, and what is allowed of them.

    float32         max|d| <= tolerance * max|y|, at every batch
    float16, int8   1 - cosine <= tolerance, the mean over images of the cosine of the two outputs

With d the difference of onnxruntime's outputs and torch's, y.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vtzoo.crops import normalised
from vtzoo.errors import ExportMismatch
from vtzoo.spec import Preprocess

Run = Callable[[Tensor], Tensor]
BATCHES = (1, 2, 5)
TOLERANCES = {"float32": 1e-3, "float16": 1e-3, "int8": 1e-2}
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one batch: torch's and onnxruntime's outputs [n, outputs] in float64, and the image size [height, width]."""

    size: tuple[int, int]
    wanted: Tensor
    found: Tensor

    @property
    def max_abs(self) -> float:
        """The largest difference."""
        return float((self.wanted - self.found).abs().max())

    @property
    def max_rel(self) -> float:
        """The same, relative to the largest output."""
        return self.max_abs / max(float(self.wanted.abs().max()), _TINY)


@torch.inference_mode()
def differences(network: Run, shipped: Run, batches: Iterable[Tensor]) -> list[Difference]:
    """Run both on each batch [n, 3, h, w]."""
    return [_difference(network(x).double(), shipped, x) for x in batches]


@torch.inference_mode()
def answers(network: Run, batches: Iterable[Tensor]) -> list[Tensor]:
    """What the network says of each batch, to be compared with more than once."""
    return [network(x).double() for x in batches]


def compared(wanted: Iterable[Tensor], shipped: Run, batches: Iterable[Tensor]) -> list[Difference]:
    """Run a file on the batches that the answers are of."""
    return [_difference(y, shipped, x) for y, x in zip(wanted, batches, strict=True)]


def _difference(wanted: Tensor, shipped: Run, x: Tensor) -> Difference:
    return Difference((x.shape[2], x.shape[3]), wanted, shipped(x).double().reshape(len(x), -1))


def random_pictures(preprocess: Preprocess, size: tuple[int, int, int] | None = None) -> list[Tensor]:
    """Pictures of noise, normalised, at every batch size; at a size other than the network's own [channels, height, width], if given."""
    shape = size or preprocess.input_size
    drawn = [torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(n)) for n in BATCHES]
    return [normalised(pixels, preprocess) for pixels in drawn]


def cosines(found: Sequence[Difference]) -> Tensor:
    """The cosine of the two outputs, by image."""
    return torch.cat([F.cosine_similarity(d.wanted, d.found, dim=-1) for d in found])


def summary(found: Sequence[Difference], *, classes: bool, several: bool = False) -> dict[str, float]:
    """What a report says over all batches: largest and mean difference, cosine, and how often both say the same.

    Args:
        found: of all batches.
        classes: whether outputs are classes.
        several: whether an image may bear several of them: then it is counted by label.
    """
    wanted, ran = torch.cat([d.wanted for d in found]), torch.cat([d.found for d in found])
    cosine = cosines(found)
    said = {
        "max_abs": max(d.max_abs for d in found),
        "max_rel": max(d.max_rel for d in found),
        "mean_abs": float((wanted - ran).abs().mean()),
        "cosine": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
    }
    if classes and several:
        said["label_agreement"] = float(((wanted > 0) == (ran > 0)).double().mean())
    elif classes:
        said["top1_agreement"] = float((wanted.argmax(-1) == ran.argmax(-1)).double().mean())
    return said


def by_batch(found: Sequence[Difference]) -> list[dict[str, object]]:
    """One row a batch size and image size: the largest differences."""
    rows: dict[tuple[int, tuple[int, int]], list[Difference]] = {}
    for d in found:
        rows.setdefault((len(d.wanted), d.size), []).append(d)
    return [
        {"batch": n, "size": "x".join(map(str, s)), "max_abs": max(d.max_abs for d in own), "max_rel": max(d.max_rel for d in own)}
        for (n, s), own in rows.items()
    ]  # fmt: skip


def judge(found: Sequence[Difference], precision: str, tolerance: float, hint: str, who: str = "onnxruntime") -> None:
    """Refuse a file that computes something else; `who` runs it.

    Raises:
        ExportMismatch: says by how much, and what was allowed.
    """
    if any(not bool(d.found.isfinite().all()) for d in found):
        raise ExportMismatch(f"{who} gives NaN or infinity in {precision}", hint)
    if precision != "float32":
        apart = distance(found)
        if not apart <= tolerance:
            said = f"{who}'s outputs in {precision} differ: 1 - cosine is {apart:.1e} (allowed {tolerance:.1e})"
            raise ExportMismatch(said, hint)
        return
    if far := [d for d in found if not d.max_rel <= tolerance]:  # NaN isn't
        worst = max(far, key=lambda d: d.max_rel)
        where = f"batch size {len(worst.wanted)}, {worst.size[0]}x{worst.size[1]} pixels"
        said = f"{who}'s outputs differ by {worst.max_rel:.1e} of the largest at {where} (allowed {tolerance:.1e})"
        raise ExportMismatch(said, hint)


def distance(found: Sequence[Difference]) -> float:
    """1 - the mean cosine."""
    return 1 - float(cosines(found).mean())

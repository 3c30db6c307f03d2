"""What exports that run share: the network in its simplest form, at one image size or at others, too, and the verification of a file."""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtzoo import talk
from vtzoo.artifact import Artifact, Live, simplest
from vtzoo.errors import NotExportable, UsageError
from vtzoo.onnx import verify
from vtzoo.onnx.convert import first_line
from vtzoo.onnx.describe import Description
from vtzoo.onnx.looks import Look
from vtzoo.onnx.run import latencies
from vtzoo.shipped import Shipped

if TYPE_CHECKING:
    from collections.abc import Iterable

Seen = tuple[Look, Look] | None
"""Real images to find ranges with, and to verify with."""


def ready_to_ship(artifact: Artifact, task: str | None, *, dynamic_size: bool) -> tuple[Live, str]:
    """The model, folded where it folds, else attached, and why; taking other sizes, too, where that is wished.

    timm's ViTs do by an argument, convolutional networks as they are.

    Raises:
        NotExportable: it takes one size only.
    """
    try:
        live, attached = simplest(artifact, task, {"dynamic_img_size": True} if dynamic_size else None)
    except UsageError:  # no such argument
        if not dynamic_size:
            raise
        live, attached = simplest(artifact, task)
    if attached:
        talk.say(f"exporting it attached: {attached}")
    if dynamic_size:
        _check_sizes(live)
    return live, attached


def _check_sizes(live: Live) -> None:
    """Refuse a network that takes one size only."""
    other = other_size(live)
    try:
        with torch.inference_mode():
            live.model(torch.zeros(1, *other))
    except (AssertionError, RuntimeError, ValueError) as error:  # all that timm and torch raise
        sides = "x".join(map(str, other[1:]))
        said = f"{live.card.name or live.card.arch} takes no images of {sides} pixels: {first_line(error)}"
        raise NotExportable(said, "leave --dynamic-size out") from error


def other_size(live: Live) -> tuple[int, int, int]:
    """Another image size, of sides that differ, [channels, height, width]: two patches higher and one wider."""
    channels, height, width = live.preprocess.input_size
    ratio = getattr(getattr(live.model, "patch_embed", None), "feat_ratio", None)
    rows, columns = ratio(as_scalar=False) if ratio else (32, 32)
    return channels, height + 2 * rows, width + columns


def described(live: Live, facts: dict[str, Any], *, embedded: bool, dynamic_size: bool) -> Description:
    """What the file says of itself."""
    return Description(
        task=live.task, preprocess=live.preprocess, embedded=embedded, dynamic_size=dynamic_size, facts=facts
    )


def verified(
    live: Live, runtime: Shipped, seen: Seen, precision: str, allowed: float, *, who: str, hint: str, dynamic_size: bool
) -> dict[str, Any]:  # fmt: skip
    """Run the file beside the network, refuse it or report.

    Args:
        live: the network.
        runtime: the file.
        seen: images; of noise unless given.
        precision: float32, float16 or int8: how differences are told.
        allowed: how large they may be.
        who: what runs the file, for messages and as a key of its time.
        hint: what to type where it is refused.
        dynamic_size: whether it takes other sizes: then one of them is looked at, too.

    Raises:
        ExportMismatch: its outputs differ by more.
    """
    batches: Iterable[Tensor] = verify.random_pictures(live.preprocess) if seen is None else seen[1]
    if dynamic_size:
        batches = chain(batches, verify.random_pictures(live.preprocess, other_size(live)))
    found = verify.differences(live.model, runtime, batches)
    verify.judge(found, precision, allowed, hint, who)
    one = verify.random_pictures(live.preprocess)[0]
    with torch.inference_mode():
        ours, torchs = latencies(runtime.bare(one), lambda: live.model(one))
    return {
        "tolerance": allowed,
        "verified_on": "random pictures" if seen is None else f"{len(seen[1].images)} images of {seen[1].images.where}",
        **verify.summary(found, classes=live.task is not None, several=bool(live.task and live.task.multilabel)),
        f"{who}_ms": ours, "torch_ms": torchs, "threads": torch.get_num_threads(), "batches": verify.by_batch(found),
    }  # fmt: skip

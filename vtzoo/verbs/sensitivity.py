"""Where a task would change a backbone: one pass of gradients over its training images, layer by layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtzoo import data as D
from vtzoo import talk
from vtzoo.anatomy import is_norm
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_sized
from vtzoo.devices import accelerator
from vtzoo.errors import UsageError
from vtzoo.folding import imaging
from vtzoo.recipe import Recipe
from vtzoo.results import Sensed
from vtzoo.sensitivity import IMAGES, scores
from vtzoo.zoo import Zoo


def sensitivity_of(
    *, ref: str, data: str, top: int | None = None, zoo: Zoo | None = None, batch_size: int = 32, image_size: int | None = None,
    seed: int = 0, skip_bad: bool = False,
) -> Sensed:  # fmt: skip
    """Score every layer of a backbone, of a dual encoder the image tower's, on a task; see `vtzoo.sensitivity` for the loss.

    Args:
        ref: a backbone of the zoo, or a timm name.
        data: see `vtzoo.data.open_data`; its train split, at most 512 images, as many of each class as there are.
        top: only so many layers, the most sensitive.
        zoo: where to look.
        batch_size: images that are contrasted with each other.
        image_size: side of the input in pixels, if not the backbone's own.
        seed: of the choice of images and their order.
        skip_bad: leave out broken images.

    Returns:
        `report`: images, classes, parameters, and `sites`, the largest first: site (a parameter's own name where it
        belongs to the network itself), kind, parameters, score (squared gradients summed over the layer and the batches),
        per_parameter, share of all scores.

    Raises:
        NotFound: no such backbone or data.
        UsageError: no batch holds two images of one class and one of another; or `top` or batch_size is none.
    """
    if batch_size < 1 or (top is not None and top < 1):
        raise UsageError(f"top={top}, batch_size={batch_size}", "give numbers from 1 on")
    bare = resolved_card(ref, zoo)
    images = D.open_data(data, split="train", skip_bad=skip_bad).limit(IMAGES, seed)
    card, model = build_sized(bare, image_size, zoo=zoo, **imaging(bare))
    model.to(accelerator(Recipe()).device)
    talk.say(f"{card.name}: gradients on {len(images)} images of {len(images.classes)} classes")
    plain = D.transforms(card.preprocess, train=False)
    batches = D.loader(images, plain, batch_size=batch_size, seed=seed)
    sites = _sites(model, scores(model, talk.track(batches, "gradients", len(batches))))
    report: dict[str, Any] = {"images": len(images), "classes": len(images.classes)}
    report |= {"parameters": sum(s["parameters"] for s in sites), "sites": sites[:top]}
    return Sensed(ref=card.name, path="", report=report)


def _sites(model: nn.Module, found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row a module that owns parameters, the largest score first."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        owner = name.rpartition(".")[0]
        row = rows.setdefault(owner or name, {"kind": _kind(model, owner), "parameters": 0, "score": 0.0})
        row["parameters"] += values.numel()
        row["score"] += values.double().sum().item()
    total = sum(r["score"] for r in rows.values())
    shown = [
        {"site": n, **r, "per_parameter": r["score"] / r["parameters"], "share": r["score"] / total if total else 0.0}
        for n, r in rows.items()
    ]
    return sorted(shown, key=lambda row: -row["score"])


def _kind(model: nn.Module, owner: str) -> str:
    """linear, conv, norm, or other."""
    module = model.get_submodule(owner)
    known = {"linear": isinstance(module, nn.Linear), "conv": isinstance(module, nn.Conv2d), "norm": is_norm(module)}
    return next((kind for kind, yes in known.items() if yes), "other")

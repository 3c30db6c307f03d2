"""How much a loss depends on every entry of the backbone's parameters: one pass of gradients, before anything is trained.

The loss is the supervised contrast of pooled features (Khosla et al. 2020, arXiv:2004.11362, eq. 2), which needs no
classifier, since a fresh one would tell nothing. A score is the squared gradient summed over the batches (the first-order
sensitivity of SPT, He et al. 2023, arXiv:2303.08566, eq. 4).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.classifier import head_names
from vtzoo.errors import UsageError
from vtzoo.probing import evaluating

Batches = Iterable[tuple[Tensor, Tensor]]
TEMPERATURE = 0.1
IMAGES = 512
"""How many images tell enough; what reads a whole data set takes no more."""


def contrast(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor | None:
    """The supervised contrastive loss of features [n, width] and labels [n], meant over those that have a mate.

    None where there is nothing to contrast: no two images share a label, or all do.
    """
    same = labels[:, None] == labels[None, :]
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    mates = (same & ~alone).sum(1)
    if not mates.any() or same.all():
        return None
    unit = F.normalize(features.flatten(1), dim=1)
    likeness = (unit @ unit.mT / temperature).masked_fill(alone, -torch.inf)
    logs = likeness.log_softmax(1).masked_fill(~same | alone, 0.0)
    return -(logs.sum(1)[mates > 0] / mates[mates > 0]).mean()


def scores(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Squared gradients of every parameter outside the head, summed over labelled batches of images [n, 3, h, w].

    The model's modes, `requires_grad` flags and gradients stay as they were, and so do torch's random numbers. Summed in
    float32 at least; a parameter that has several names has its scores under each.

    Raises:
        UsageError: no batch holds two images of one class and one of another.
    """
    inside = tuple(h + "." for h in head_names(model))
    named = model.named_parameters(remove_duplicate=False)
    watched = {n: p for n, p in named if not (inside and n.startswith(inside))}
    before = {n: p.requires_grad for n, p in watched.items()}
    wide = {p.dtype: torch.promote_types(p.dtype, torch.float32) for p in watched.values()}
    found = {n: torch.zeros_like(p, dtype=wide[p.dtype], requires_grad=False) for n, p in watched.items()}
    used = 0
    try:
        for p in watched.values():
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):  # loaders draw a seed
            for images, labels in batches:
                used += _add(model, watched, found, images, labels)
    finally:
        for n, p in watched.items():
            p.requires_grad_(before[n])
    if not used:
        raise UsageError(
            "no batch holds two images of one class and one of another, so there is nothing to contrast",
            "give larger batches, or more images of each class",
        )
    return found


def _add(
    model: nn.Module, watched: Mapping[str, nn.Parameter], found: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> bool:
    """Add one batch's squared gradients; False where it had nothing to tell."""
    like = next(iter(watched.values()))
    features = model.forward_head(model.forward_features(images.to(like.device, like.dtype)), pre_logits=True)  # type: ignore[operator] - methods of timm models
    loss = contrast(features, labels.to(like.device))
    if loss is None:
        return False
    grads = torch.autograd.grad(loss, list(watched.values()), allow_unused=True)
    for name, grad in zip(watched, grads, strict=True):
        if grad is not None:
            found[name].add_(grad.to(found[name].dtype).square())
    return True

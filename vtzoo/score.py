"""One evaluation pass and what is measured in it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import parallel

ECE_BINS = 15


@torch.inference_mode()
def logits_of(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], run: Callable[[nn.Module, Tensor], Tensor] | None = None,
    shared: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a model over labelled batches: ([n, classes] float32, [n]).

    Args:
        model: comes back in the mode in which it was.
        batches: (inputs, labels).
        run: how, where the inputs aren't images.
        shared: how many images there are, where processes take turns with them (see `parallel.turns`); all get what all found.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # an exported file shows none
    was, model = model.training, model.eval()
    run = run or nn.Module.__call__
    pairs = [(run(model, x.to(device)).float().cpu(), y) for x, y in batches]
    model.train(was)
    logits, labels = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    return (parallel.gathered(logits, shared), parallel.gathered(labels, shared)) if shared else (logits, labels)


def measure(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1, top-5, balanced accuracy (mean recall of the classes present), loss in nats, ECE, confusion.

    Of images with several labels: mean average precision and F1 (see `several`).

    Args:
        logits: [n, classes].
        labels: [n], class indices; or [n, classes], 1 for each label of an image.

    Returns:
        Fractions in [0, 1]; `confusion[true][predicted]` counts images; `images` is n.
    """
    if labels.ndim > 1:
        return several(logits, labels)
    n, classes = logits.shape
    guess = logits.argmax(-1)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion.index_put_((labels, guess), torch.ones(n, dtype=torch.long), accumulate=True)
    support = confusion.sum(1)
    recall = confusion.diagonal()[support > 0] / support[support > 0]
    top5 = (logits.topk(min(5, classes), dim=-1).indices == labels[:, None]).any(-1)
    return {
        "top1": (guess == labels).double().mean().item(),
        "top5": top5.double().mean().item(),
        "balanced_accuracy": recall.double().mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "ece": expected_calibration_error(logits, labels),
        "images": n,
        "confusion": confusion.tolist(),
    }


def several(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Mean average precision, micro and macro F1 at probability 0.5, and binary cross-entropy in nats, mean over all labels.

    Average precision of a label is the mean, over the images that bear it, of the share of them among all that score as high or
    higher (Everingham et al. 2010, without interpolation). Means over labels are over those that some image bears.

    Args:
        logits: [n, classes].
        labels: [n, classes], 0 and 1.
    """
    truth, scores = labels > 0, logits.double()
    guess = scores > 0
    hits, said, there = (guess & truth).sum(0), guess.sum(0), truth.sum(0)
    borne = there > 0
    f1 = 2 * hits / (said + there).clamp(min=1)
    precisions = [_average_precision(scores[:, c], truth[:, c]) for c in borne.nonzero().flatten().tolist()]
    return {
        "map": sum(precisions) / max(1, len(precisions)),
        "micro_f1": (2 * hits.sum() / (said.sum() + there.sum()).clamp(min=1)).item(),
        "macro_f1": f1[borne].double().mean().item() if borne.any() else 0.0,
        "loss": F.binary_cross_entropy_with_logits(scores, labels.double()).item(),
        "images": len(labels),
    }


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    """Of one label, [n] and [n]; images of equal score count as one step."""
    own, every = scores[truth].sort().values, scores.sort().values
    above, right = (len(s) - torch.searchsorted(s, own) for s in (every, own))
    return (right / above).double().mean().item()


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, guess = logits.double().softmax(-1).max(-1)
    right = (guess == labels).double()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    zeros = torch.zeros(ECE_BINS, dtype=torch.float64)
    gap = zeros.index_add(0, bins, confidence) - zeros.index_add(0, bins, right)
    return (gap.abs().sum() / len(labels)).item()


def brief(metrics: dict[str, Any]) -> dict[str, Any]:
    """The scalars, rounded for an index or a header; the confusion matrix is left out."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items() if k != "confusion"}

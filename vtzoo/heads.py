"""Classifiers in closed form: ridge regression on features, its strength chosen by leaving each image out in turn.

    minimise over W, b   sum_i |W x_i + b - y_i|^2 + r |W - W0|^2

With X = U S V' of the centred features the error of image i without image i is its residual / (1 - h_i), h_i = 1/n + sum_j u_ij^2
s_j^2 / (s_j^2 + r): all strengths cost one decomposition (Golub, Heath & Wahba 1979, doi:10.1080/00401706.1979.10489751).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vtzoo.errors import NotFoldable

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-10, 7))
"""Of the ridge, as shares of the mean squared singular value."""
TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-8, 33))


def linear_head(tensors: Mapping[str, Tensor], who: str) -> tuple[Tensor, Tensor]:
    """A head's weight [classes, features] and bias [classes].

    Raises:
        NotFoldable: it is no single linear layer.
    """
    weights = [n for n in tensors if n.endswith("weight")]
    first = tensors[weights[0]] if weights else torch.zeros(0)
    if len(weights) != 1 or first.ndim not in (2, 4) or first[0, 0].numel() != 1 or len(tensors) > 2:
        raise NotFoldable(
            f"{who} has a head that is not one linear layer",
            "take a merge that looks at features alone, such as regmean, without --search and --refit-heads",
        )
    bias = tensors.get(weights[0].removesuffix("weight") + "bias")
    weight = first.float().flatten(1)
    return weight, torch.zeros(len(weight)) if bias is None else bias.float()


def refitted(tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """A head's tensors with another weight and bias, in their own shapes and dtypes; without a bias, where it has none."""
    return {n: (weight if n.endswith("weight") else bias).reshape(t.shape).to(t.dtype) for n, t in tensors.items()}


def layer_of(tensors: Mapping[str, Tensor], who: str) -> str:
    """Where a head's linear layer is: "head." or what timm calls it.

    Raises:
        NotFoldable: it is none, such as a 1x1 convolution.
    """
    weights = [n for n in tensors if n.endswith("weight")]  # not by `linear_head`, which takes 1x1 convolutions, too
    if len(weights) != 1 or tensors[weights[0]].ndim != 2 or len(tensors) > 2:
        raise NotFoldable(
            f"{who} has a head that is not one linear layer, which alone can be corrected", "leave surgery out"
        )
    return weights[0].removesuffix("weight")


def corrected(tensors: Mapping[str, Tensor], down: Tensor, up: Tensor, who: str) -> dict[str, Tensor]:
    """A linear head W, b behind z - up relu(down z), as the tensors of `mlp-head[skip=true]` in its place.

    Args:
        tensors: of the head, by timm name.
        down: [rank, features].
        up: [features, rank].
        who: the task, for a message.

    Raises:
        NotFoldable: it is no linear layer, such as a 1x1 convolution.
    """
    (weight, bias), place = linear_head(tensors, who), layer_of(tensors, who)
    own = {"skip.weight": weight, "mlp.0.weight": down, "mlp.0.bias": torch.zeros(len(down))}
    own |= {"mlp.3.weight": -weight @ up, "mlp.3.bias": bias}
    return {f"{place}{n}": t for n, t in own.items()}


def ridge(features: Tensor, wanted: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit weight [outputs, features] and bias [outputs].

    Args:
        features: [n, features].
        wanted: [n, outputs].
        prior: the weight to stay near to; zero unless given.
    """
    x, y = features.double(), wanted.double()
    start = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64) if prior is None else prior.double()
    middle = x.mean(0)
    rest = y - x @ start.T
    level = rest.mean(0)
    left, values, right = torch.linalg.svd(x - middle, full_matrices=False)
    codes, squares = left.T @ (rest - level), values.square()
    best = (float("inf"), squares)
    for strength in STRENGTHS:
        shrink = squares / (squares + strength * squares.mean().clamp(min=1e-30))
        own = 1 / len(x) + left.square() @ shrink
        error = ((rest - level - left @ (shrink[:, None] * codes)) / (1 - own).clamp(min=1e-9)[:, None]).square().mean()
        best = min(best, (float(error), shrink), key=lambda b: b[0])
    scale = torch.where(values > 0, best[1] / values.clamp(min=1e-30), 0.0)
    weight = start + (codes.T * scale) @ right
    return weight.float(), (level + middle @ start.T - middle @ weight.T).float()


def classifier(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit to labels: ridge on one-hot targets, then a factor on the logits that makes the labels most probable.

    Args:
        features: [n, features].
        labels: [n], class indices.
        classes: how many.
    """
    weight, bias = ridge(features, F.one_hot(labels, classes).double())
    logits = F.linear(features, weight, bias)
    factor = min(TEMPERATURES, key=lambda f: F.cross_entropy(f * logits, labels).item())
    return factor * weight, factor * bias

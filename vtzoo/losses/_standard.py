"""Forms in which a teacher's features are taught: z-scores, PHI-S, and their first principal components."""

import torch
from torch import Tensor, nn

from vtzoo.losses._hadamard import levelling
from vtzoo.losses._outputs import exact, wide

LEAST = 1e-3
"""The smallest standard deviation that is brought to one."""


class Projected(nn.Module):
    """(x - mean) @ directions; [n, width] -> [n, out]."""

    mean: Tensor
    directions: Tensor

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)

    def forward(self, features: Tensor) -> Tensor:
        """As exact as the features were."""
        with exact(features):
            return (features.to(self.mean.dtype) - self.mean) @ self.directions


class Scored(nn.Module):
    """(x - mean) / std, each dimension by itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: Tensor) -> Tensor:
        """z-scores."""
        return (features.to(self.mean.dtype) - self.mean) / self.std


def scored(features: Tensor) -> Scored:
    """z-scores over the images; [n, width]."""
    features = wide(features)
    return Scored(features.mean(0), features.std(0).clamp(min=LEAST))


def phi_s(features: Tensor) -> Projected:
    """PHI-S (Ranzinger et al. 2024, arXiv:2410.01680): rotate so that all dimensions have one variance, then one scale; [n, width].

    Lengths keep their proportions, where z-scores stretch what hardly varies.
    """
    mean, variances, vectors = principal(features)
    turned = vectors @ levelling(variances).T
    scale = variances.mean().sqrt().clamp(min=LEAST)
    return Projected(mean, (turned / scale).to(mean.dtype))


def principal(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [width], then variances [width] and their directions [width, width], float64, from small to large.

    The largest entry of a direction is positive, so that the same features give the same form.
    """
    features = wide(features)
    mean = features.mean(0)
    with exact(features):
        variances, vectors = torch.linalg.eigh(torch.cov((features - mean).double().T))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return mean, variances.clamp(min=0), vectors * largest.sign()

"""Shared by the methods that add a dense matrix, made of few numbers, to a layer's weight."""

import math

import torch
from torch import Tensor

from vtzoo.anatomy import Site
from vtzoo.graft import Before, Graft


def plus(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale * B h in one pass over y: [..., out], [..., rank], [out, rank] -> [..., out]."""
    B = B if scale == 1.0 else scale * B
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.mT).reshape(y.shape)


def matrix(site: Site) -> tuple[int, int]:
    """A layer's weight as a matrix: outputs, and inputs per group times the kernel's places."""
    return site.shape[0], math.prod(site.shape[1:])


class Increment(Graft):
    """W' = W + increment(), in the weight as it is read. Subclasses override `increment`."""

    calls = False
    edits = ("weight",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.shape, (self.out, self.fan_in) = site.shape, matrix(site)

    def increment(self) -> Tensor:
        """What is added, [out, fan_in]."""
        raise NotImplementedError(type(self).__name__)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the increment."""
        weight = before[name]
        return weight + self.increment().to(weight.dtype).reshape(self.shape)

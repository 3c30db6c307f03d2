"""APE: keep the training images' most telling channels, and weigh each image by how far the texts put it from its class (Zhu et al. 2023, arXiv:2304.01195).

    logits = W f + b + alpha exp(-beta (1 - f_q K_q')) (V * exp(gamma D)),   D_n = log2(1 / p_n),   p_n: image n's class in softmax(K_q T_q')

f, K and V as in tip-adapter; T are the classes' directions, W = scale T. q are the channels that are alike in no two classes and vary most between
texts: those with the largest (1 - balance) * -S_d + balance * V_d, S_d the mean product of two classes' vectors, V_d the variance of T_d.
f_q, K_q and T_q are normalised again. With train=true (APE-T) one residual for each class moves its text and its images, and each image has a
learned weight:

    logits = W f + b + scale f_q x' + alpha exp(-beta (1 - f (K + x_class)')) (V * r)

Shapes: K_q [images, channels], D [images]; with train=true K [images, features], x [classes, channels], r [images].
Folds: no: the images are compared one by one (a headless fold leaves it out).
Identity at init: yes (of the features; the logits have the images' word at once).
Parameters: none is trained; with train=true classes * channels + images, in the head.
Departs from the paper: half of the channels are kept unless told otherwise (the paper: 500 of 1024 on ImageNet); logarithms are base 2, and a
millionth is added, as in the authors' code (github.com/yangyangyang127/APE), where also S_d is of texts alone with train=true; an image's key is that of
one view, not the mean of ten; alpha, beta and gamma are searched only with search=true.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.graft import Graft
from vtzoo.methods._cache import Cache, Knobs, grid, remembered, tune, within
from vtzoo.methods._features import sites
from vtzoo.text_head import TextHead

GROUP = "adapter/sequential"
PAPER = "arXiv:2304.01195"
RECIPE = {"tokens": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-1}, "maps": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-1}}  # fmt: skip
GAMMAS = (0.0, 1.0, 20)
"""From where to where the search for gamma goes, in how many steps."""
TINY = 1e-6
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "head", "prepare", "sites", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Knobs):
    """Knobs over those of what the images say.

    Attributes:
        alpha: how much the images say beside the classifier.
        beta: how fast an image's word fades with its distance.
        gamma: how much more images say that the texts put far from their class.
        channels: how many are kept; half of them unless given.
        balance: what variance counts in their choice, from 0 to 1; the rest is for being alike in no two classes. 0.3, with train=true 0.8 unless given.
        train: learn a residual for each class, and a weight for each image.
    """

    alpha: Annotated[float, Field(ge=0)] = 2.0
    beta: Annotated[float, Field(gt=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 0.1
    channels: Annotated[int, Field(ge=1)] | None = None
    balance: Annotated[float, Field(ge=0, le=1)] | None = None
    train: bool = False


class Few(Cache):
    """Images beside some of the channels."""

    channels: Tensor

    def check(self) -> None:
        """Refuse channels, too, that there are not.

        Raises:
            Corrupt: the first such.
        """
        super().check()
        within(self.channels, self.weight.shape[1], "it compares channel")


class Refined(Few):
    """Images compared in some of their channels, and weighed."""

    rows = ("keys", "labels", "apart")
    apart: Tensor
    gamma: Tensor

    def __init__(self, old: nn.Linear | TextHead, config: Config) -> None:
        super().__init__(old, config, width := count(old.in_features, config))
        _choose(self, width)
        self.register_buffer("apart", self.weight.new_zeros(0))
        self.register_buffer("gamma", self.weight.new_full((), config.gamma))

    def likeness(self, features: Tensor) -> Tensor:
        """In the kept channels [n, images]."""
        return F.normalize(features[:, self.channels.long()], dim=-1) @ self.keys.mT

    def values(self) -> Tensor:
        """[images, classes]."""
        return super().values() * torch.exp(self.gamma * self.apart)[:, None]

    def choices(self) -> Iterator[tuple[dict[str, float], Tensor]]:
        """Every gamma."""
        for gamma in grid(*GAMMAS):
            yield {"gamma": gamma}, super().values() * torch.exp(gamma * self.apart)[:, None]


class Moved(Few):
    """Texts and images of a class moved by one residual in some channels; images with weights."""

    rows = ("keys", "labels", "worth")
    scale: Tensor

    def __init__(self, old: nn.Linear | TextHead, config: Config) -> None:
        super().__init__(old, config)
        width = count(old.in_features, config)
        _choose(self, width)
        self.register_buffer("scale", self.weight.new_ones(()))
        self.residual = nn.Parameter(self.weight.new_zeros(len(self.weight), width))
        self.worth = nn.Parameter(self.weight.new_ones(0))

    def base(self, features: Tensor) -> Tensor:
        """The classifier, its texts moved [n, classes]."""
        return super().base(features) + self.scale * self._along(features)

    def likeness(self, features: Tensor) -> Tensor:
        """With the images moved [n, images]."""
        return super().likeness(features) + self._along(features)[:, self.labels.long()]

    def values(self) -> Tensor:
        """[images, classes]."""
        return super().values() * self.worth[:, None]

    def _along(self, features: Tensor) -> Tensor:
        return features[:, self.channels.long()] @ self.residual.mT


def head(old: nn.Linear | TextHead, config: Config) -> nn.Module:
    """The classifier with room for the images beside it."""
    return Moved(old, config) if config.train else Refined(old, config)


@torch.no_grad()
def prepare(head: Refined | Moved, config: Config, features: Tensor, labels: Tensor) -> None:
    """Keep images [n, width] with their labels [n], and choose channels."""
    unit, texts = remembered(head, config, features, labels), F.normalize(head.weight, dim=-1)
    head.channels.copy_(chosen(texts, unit, labels, len(head.channels), config))
    if isinstance(head, Moved):
        head.keys.copy_(unit)
        head.worth.fill_(1.0)
        head.scale.copy_(head.weight.norm(dim=-1).mean())
        return
    keys, few = (F.normalize(t[:, head.channels], dim=-1) for t in (unit, texts))
    own = (keys @ few.mT).softmax(-1).gather(1, labels[:, None])[:, 0]
    head.keys.copy_(keys)
    head.apart.copy_(torch.log2((1 + TINY) / (own + TINY)))


def count(width: int, config: Config) -> int:
    """How many channels are kept."""
    return min(config.channels or max(1, width // 2), width)


def chosen(texts: Tensor, keys: Tensor, labels: Tensor, count: int, config: Config) -> Tensor:
    """The channels by the paper's criterion, in their order.

    Args:
        texts: directions of the classes [classes, width].
        keys: of the images [n, width].
        labels: [n].
        count: how many.
        config: its balance, and whether the images are looked at beside the texts.
    """
    balance = config.balance if config.balance is not None else 0.8 if config.train else 0.3
    sums, sizes = texts, torch.ones_like(texts[:, 0])
    if not config.train:
        sums = texts.index_add(0, labels, keys)
        sizes = sizes.index_add(0, labels, torch.ones_like(keys[:, 0]))
    products = sums.sum(0).square() - sums.square().sum(0)
    alike = products / (sizes.sum().square() - sizes.square().sum())
    return (balance * texts.var(dim=0) - (1 - balance) * alike).topk(count).indices.sort().values


def _choose(module: nn.Module, width: int) -> None:
    module.register_buffer("channels", torch.arange(width, dtype=torch.int32))

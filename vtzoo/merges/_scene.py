"""A merged network at work: a plain model that takes on any tensors, and each task's images and classifier.

A file of this folder with a function `look(scene, **knobs)` must see it before anything is written: it fills `scene.told`, one mapping by
tensor name for each task, and its merge finds them there as `vectors.evidence(task)`. Search, refitted heads and reports use it too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.merges._whole import Whole

CHUNK = 64
"""So many images go through the network at once."""
Head = tuple[Tensor, Tensor]
Told = list[dict[str, Tensor]]
Make = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The network, and each task's images and classifier.

    Attributes:
        model: plain, frozen, without a head; its weights are the receiver's to change.
        whole: the task vectors.
        tensor: gives a tensor of the merged network as `told` makes it now.
        told: one mapping per task, to be filled.
        heads: weight [classes, features] and bias [classes] of each task's classifier; empty where nobody needs them.
        images: of each task, [n, c, h, w].
        labels: of each task, [n]; all -1 where nobody needs them.
    """

    model: nn.Module
    whole: Whole
    tensor: Make
    told: Told
    heads: Sequence[Head]
    images: Sequence[Tensor]
    labels: Sequence[Tensor]

    @property
    def tasks(self) -> list[int]:
        """Those that take part, in an order that needn't be the user's."""
        return [t for t in self.whole.order if self.whole.weights[t]]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def load(self, make: Make | None = None, names: Iterable[str] | None = None) -> None:
        """Give the network tensors: the merged ones, unless `make` gives others."""
        state = self.model.state_dict()
        for name in self.whole.shapes if names is None else names:
            state[name].copy_((make or self.tensor)(name))

    def load_expert(self, task: int) -> None:
        """Give the network one task vector alone."""
        whole = self.whole
        self.load(lambda n: whole.ground[n] + whole.read(task, n) if n in whole.names[task] else whole.ground[n])

    @torch.no_grad()
    def features(self, task: int) -> Tensor:
        """What reaches the classifier for all of a task's images, [n, features]."""
        device = self.device
        return torch.cat([self.model(x.to(device)).float().cpu() for x in self.images[task].split(CHUNK)])

    def logits(self, task: int, features: Tensor) -> Tensor:
        """What a task's classifier says, [n, classes]."""
        return F.linear(features, *(h.to(features.device) for h in self.heads[task]))

    def accuracy(self, task: int) -> float:
        """The share of a task's images that the network, as it is loaded, puts into their class."""
        return (self.logits(task, self.features(task)).argmax(-1) == self.labels[task]).double().mean().item()

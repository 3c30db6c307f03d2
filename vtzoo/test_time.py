"""Predict with prompts tuned on the very image (test-time prompt tuning, TPT; Shu et al. 2022, arXiv:2209.07511, eq. 3-5).

    v' = v after a step of AdamW on H(mean over kept views of softmax(logits(view; v))),   prediction = softmax(logits(image; v'))

An image is seen whole and in random crops; those views are kept for which the prediction's own entropy H is lowest. For the next image
all starts anew: nothing is kept, so this is no method that makes a delta. v are the prompts that a delta has learned, or, of one
that has none (zero-shot), its templates' words in front of the name.
Departs from the paper: of several templates the words of all are tuned; a picture's crops depend on the picture and the seed alone.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import data, knobs
from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.errors import UsageError
from vtzoo.tunable import tunable

NAME = "tpt"
CROP = 0.08
"""The least share of the picture that a random crop shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs of `tpt`.

    Attributes:
        views: of an image, itself among them; the others are random crops, mirrored half the time.
        keep: the share of them that counts, those with the surest predictions.
        steps: of AdamW.
        lr: its learning rate.
        augmix: mix each crop with changed ones (Hendrycks et al. 2020, arXiv:1912.02781), as the paper does on fine-grained tasks.
        seed: of the crops.
    """

    views: Annotated[int, Field(ge=1)] = 64
    keep: Annotated[float, Field(gt=0, le=1)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 1
    lr: Annotated[float, Field(gt=0)] = 5e-3
    augmix: bool = False
    seed: int = 0


def asked(spec: str) -> Config:
    """What `--test-time` says.

    Raises:
        UsageError: it is something else than tpt, or a knob is wrong.
    """
    part = knobs.one(spec)
    if part.name != NAME:
        raise UsageError(f"nothing for test time is called '{part.name}'", f"write {NAME}[views=64]")
    found = knobs.decode(Config, part.knobs, NAME)
    assert isinstance(found, Config)
    return found


@dataclass(frozen=True)
class Tuner:
    """A network whose prompts are tuned on each image.

    Attributes:
        live: the network, with its text tower.
        config: how.
        prompts: what is tuned.
        deep: the image tower has prompts, too, so that its features depend on them.
    """

    live: Live
    config: Config
    prompts: Sequence[nn.Parameter]
    deep: bool

    def over(self, images: data.Images) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] in float32 and labels [n]."""
        return torch.stack([self(images.picture(i)) for i in range(len(images))]), images.targets

    def __call__(self, image: Image.Image) -> Tensor:
        """Logits [classes] of one image in float32; the prompts are afterwards what they were."""
        before = [p.detach().clone() for p in self.prompts]
        try:
            return self._tuned(self._views(image)).float().cpu()
        finally:
            with torch.no_grad():
                for prompt, value in zip(self.prompts, before, strict=True):
                    prompt.copy_(value)

    def _tuned(self, views: Tensor) -> Tensor:
        model: Any = self.live.model
        with torch.no_grad():
            features = model.forward_head(model.forward_features(views), pre_logits=True)
            kept = surest(F.linear(features, *self._start), self.config.keep)
        run, seen = (model, views) if self.deep else (model.get_classifier(), features)
        optimizer = torch.optim.AdamW(self.prompts, lr=self.config.lr)
        for _ in range(self.config.steps):
            found = torch.autograd.grad(uncertainty(run(seen[kept])), self.prompts)
            for prompt, gradient in zip(self.prompts, found, strict=True):
                prompt.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return run(seen[:1])[0]

    @cached_property
    def _start(self) -> tuple[Tensor, Tensor]:
        """The classifier before any tuning."""
        with torch.no_grad():
            return self.live.model.get_classifier().layer()  # type: ignore[operator,union-attr] - a TextHead

    @cached_property
    def _transforms(self) -> tuple[data.Transform, data.Transform]:
        return data.transforms(self.live.preprocess, train=False), _crops(self.live, augmix=self.config.augmix)

    def _views(self, image: Image.Image) -> Tensor:
        """The picture as the network usually sees it, and crops of it: [views, c, h, w]."""
        whole, crop = self._transforms
        like = self.prompts[0]
        with data.seeded(data.mixed(self.config.seed, zlib.crc32(image.tobytes()))):
            views = [whole(image), *(crop(image) for _ in range(self.config.views - 1))]
        return torch.stack(views).to(like.device, like.dtype)


def surest(logits: Tensor, share: float) -> Tensor:
    """The places of the views [n, classes] with the lowest entropies, one at least."""
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy.argsort()[: max(1, int(share * len(logits)))]


def uncertainty(logits: Tensor) -> Tensor:
    """The entropy of the mean prediction over views [n, classes], in nats."""
    mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(mean.exp() * mean.clamp(min=torch.finfo(mean.dtype).min)).sum()


def speaking(artifact: Artifact, task: str | None) -> Live:
    """A delta on a dual encoder, with its text tower.

    Raises:
        UsageError: it has none.
    """
    if artifact.delta is None or not artifact.delta.backbone.model_args.get("text"):
        raise UsageError(
            f"{NAME} tunes what a text tower is told, and '{artifact.ref}' is no delta with one",
            "use one on a clip: backbone, such as coop's or zero-shot's",
        )
    return go_live(artifact, task, whole=True)


def tuner(live: Live, config: Config) -> Tuner:
    """A dual encoder that classifies by names, made ready.

    Raises:
        UsageError: its classifier is not what the text tower makes of the classes' names, or images have several of them.
    """
    assert live.task is not None
    if live.task.multilabel:
        raise UsageError(f"{NAME} makes one class surer, and an image here has several", "leave --test-time out")
    return Tuner(live, config, *tunable(live.model, live.task))


def _crops(live: Live, *, augmix: bool) -> data.Transform:
    """A random crop, mirrored half the time, perhaps mixed with changed ones, as the network's input."""
    from torchvision import transforms as T  # type: ignore[reportMissingTypeStubs, unused-ignore] - torchvision ships no stubs

    to = live.preprocess
    how = T.InterpolationMode(to.interpolation if to.interpolation != "random" else "bilinear")
    steps: Iterable[Any] = (
        T.RandomResizedCrop(to.input_size[1:], scale=(CROP, 1.0), interpolation=how),
        T.RandomHorizontalFlip(),
        *([T.AugMix(severity=1, all_ops=False)] if augmix else []),
        T.ToTensor(),
        T.Normalize(to.mean, to.std),
    )
    return T.Compose(steps)

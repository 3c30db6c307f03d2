"""The classifiers on features beside their formulas on the open_clip model of the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import families
from tests.contract.cases import logits, relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import NAMES, TEMPLATE, images, made, say
from tests.parity.dual_case import dual, folded
from vtzoo.live import inject, trainable

TEMPLATES = [TEMPLATE, "a drawing of the {}."]
KINDS = ("clip", "siglip")


def shots(count: int = 7) -> tuple[Tensor, Tensor]:
    """Training images, and of which class each is; unequally many of each."""
    return torch.cat([images() + 0.3 * i for i in range(count)])[:count], torch.arange(count) % len(NAMES)


def head(
    spec: str, kind: str = "clip", *, alike: bool = False, templates: tuple[str, ...] = (TEMPLATE,)
) -> tuple[Any, Any]:
    """A network with such a classifier, whose trained tensors are moved, and the classifier; of each class one image, or unequally many."""
    model: Any = inject(dual(kind, templates), spec, batches=[shots(len(NAMES) if alike else 7)])
    families.perturb(dict(trainable(model)))
    return model.eval().requires_grad_(requires_grad=False), model.clip_head


def texts(kind: str = "clip", templates: tuple[str, ...] = (TEMPLATE,)) -> Tensor:
    """The directions of the classes."""
    return r.class_features(made(kind), say, NAMES, templates)


@torch.no_grad()
def keys(kind: str = "clip", count: int = 7) -> Tensor:
    """The training images' features."""
    return r.unit(made(kind).encode_image(shots(count)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_clip_adapter(kind: str, agree) -> None:
    """The adapter on features that aren't normalised, with the authors' second relu."""
    model, own = head("clip-adapter[ratio=0.3]", kind)
    wanted = r.clip_adapter(made(kind), images(), texts(kind), own.down.weight, own.up.weight, 0.3)
    agree(f"clip-adapter, {kind}", "rewrite", logits=relative(wanted, logits(model, images())))


@pytest.mark.parametrize("kind", KINDS)
def test_task_residual(kind: str, agree) -> None:
    """The residual is added to embeddings of their own length; attached and folded."""
    model, own = head("task-residual[alpha=0.7]", kind)
    embedded = made(kind).encode_text(say([TEMPLATE.format(n) for n in NAMES]))
    wanted = r.task_residual(made(kind), images(), embedded, own.residual, 0.7)
    found = {"logits": logits(model, images()), "folded": logits(folded(model, kind), images())}
    agree(f"task-residual, {kind}", "rewrite", **{n: relative(wanted, x) for n, x in found.items()})


@pytest.mark.parametrize("spec", ["tip-adapter[alpha=2,beta=3]", "tip-adapter-f[alpha=2,beta=3]"])
def test_tip_adapter(spec: str, agree) -> None:
    """Keys are the images' features, in -F moved from there, and then used as they are; the texts of several templates."""
    model, own = head(spec, templates=tuple(TEMPLATES))
    kept = own.keys if "-f" in spec else keys()
    wanted = r.tip_adapter(made(), images(), texts(templates=tuple(TEMPLATES)), kept, shots()[1], 2.0, 3.0)
    agree(spec, "rewrite", logits=relative(wanted, logits(model, images())))


def test_ape(agree) -> None:
    """The channels of the criterion, the images' weights, and the sum."""
    model, own = head("ape[channels=9,alpha=2,beta=3,gamma=0.4]", alike=True)
    count = len(NAMES)
    kept, labels = keys(count=count), torch.arange(count)
    channels = r.ape_channels(texts(), kept, labels, 9)
    assert set(channels.tolist()) == set(own.channels.tolist())
    wanted = r.ape(made(), images(), texts(), kept, labels, channels, 2.0, 3.0, 0.4)
    agree("ape", "rewrite", logits=relative(wanted, logits(model, images())))


def test_ape_trained(agree) -> None:
    """One residual for a class's text and images, which aren't normalised again, and a weight for each image; channels by the texts alone."""
    model, own = head("ape[channels=9,train=true,alpha=2,beta=3]")
    alike = torch.stack([a * b for i, a in enumerate(texts()) for j, b in enumerate(texts()) if i != j]).mean(0)
    assert set((0.8 * texts().var(dim=0) - 0.2 * alike).topk(9).indices.tolist()) == set(own.channels.tolist())
    labels, channels = shots()[1], own.channels.long()
    wanted = r.ape_trained(made(), images(), texts(), keys(), labels, channels, own.residual, own.worth, 2.0, 3.0)
    agree("ape[train=true]", "rewrite", logits=relative(wanted, logits(model, images())))

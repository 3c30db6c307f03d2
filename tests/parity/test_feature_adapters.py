"""The classifiers behind a dual encoder's image tower, beside their formulas on the open_clip model of the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import logits, relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import NAMES, TEMPLATE, images, made, say
from tests.parity.dual_case import dual, folded
from vtzoo.live import inject

SHOTS, CLASSES = images(8, seed=7), torch.tensor([2, 0, 1, 3, 3, 1, 2, 0])
"""Two training images of each class, in no order."""


def classifier(spec: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A dual encoder with a method's classifier, whatever it trains perturbed, and the classifier's tensors."""
    model: Any = inject(dual(), spec, batches=[(SHOTS[:5], CLASSES[:5]), (SHOTS[5:], CLASSES[5:])])
    families.perturb({n: p.detach() for n, p in model.clip_head.named_parameters()})
    return model.eval(), model.clip_head.state_dict()


@pytest.fixture(scope="module")
def texts() -> Tensor:
    """The classes' embeddings as they are."""
    return made().encode_text(say([TEMPLATE.format(n) for n in NAMES]))


@pytest.fixture(scope="module")
def keys() -> Tensor:
    """The shots' embeddings, normalised."""
    return r.unit(made().encode_image(SHOTS))


def test_clip_adapter(texts: Tensor, agree) -> None:
    """The adapter on features that are normalised before, too, is the authors' on features as they are."""
    model, own = classifier("clip-adapter[ratio=0.3,reduction=3]")
    wanted = r.clip_adapter(made(), images(), texts, own["down.weight"], own["up.weight"], 0.3)
    agree("clip-adapter", "rewrite", logits=relative(wanted, logits(model, images())))


def test_task_residual(texts: Tensor, agree) -> None:
    """What is added is added to texts as the tower gives them."""
    model, own = classifier("task-residual[alpha=0.7]")
    wanted = r.task_residual(made(), images(), texts, own["residual"], 0.7)
    found = {"logits": logits(model, images()), "folded": logits(folded(model), images())}
    agree("task-residual", "rewrite", **{n: relative(wanted, x) for n, x in found.items()})


def test_tip_adapter(texts: Tensor, keys: Tensor, agree) -> None:
    """Its keys are the shots' embeddings, which Tip-Adapter-F moves."""
    model, own = classifier("tip-adapter[alpha=0.7,beta=3]")
    wanted = r.tip_adapter(made(), images(), texts, keys, CLASSES, 0.7, 3.0)
    agree("tip-adapter", "rewrite", keys=relative(keys, own["keys"]), logits=relative(wanted, logits(model, images())))
    trained, own = classifier("tip-adapter-f[alpha=0.7,beta=3]")
    assert relative(keys, own["keys"]) > 1e-3
    wanted = r.tip_adapter(made(), images(), texts, own["keys"], CLASSES, 0.7, 3.0)
    agree("tip-adapter-f", "rewrite", logits=relative(wanted, logits(trained, images())))


def test_ape(texts: Tensor, keys: Tensor, agree) -> None:
    """The channels it keeps, and what images say in them."""
    model, own = classifier("ape[alpha=1.5,beta=2,gamma=0.3,channels=9]")
    t = r.unit(texts)
    kept = r.ape_channels(t, keys, CLASSES, 9)
    assert own["channels"].tolist() == sorted(kept.tolist())
    wanted = r.ape(made(), images(), t, keys, CLASSES, kept, 1.5, 2.0, 0.3)
    agree("ape", "rewrite", logits=relative(wanted, logits(model, images())))


def test_ape_trained(texts: Tensor, keys: Tensor, agree) -> None:
    """Its channels are chosen by the texts alone; a class's residual moves its text and its images; each image has its worth."""
    model, own = classifier("ape[alpha=1.5,beta=2,channels=9,train=true]")
    t = r.unit(texts)
    kept = r.ape_channels(t, keys[:0], CLASSES[:0], 9, similar=0.2, spread=0.8).sort().values
    assert own["channels"].tolist() == kept.tolist()
    wanted = r.ape_trained(made(), images(), t, keys, CLASSES, kept, own["residual"], own["worth"], 1.5, 2.0)
    agree("ape[train=true]", "rewrite", logits=relative(wanted, logits(model, images())))

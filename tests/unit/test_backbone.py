"""Building a backbone: which classifier it starts with."""

import math

import torch

from vtzoo import build
from vtzoo.backbone import card_of
from vtzoo.bases import weights_path
from vtzoo.tensors import TensorFile

NAME = "tf_efficientnet_lite0"


def test_a_fresh_head_starts_near_zero() -> None:
    """The first loss over ten classes is that of a guess, log 10, whatever range timm would have drawn from."""
    model = build(NAME, num_classes=10)
    logits = model(torch.randn(4, 3, 64, 64))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert abs(loss.item() - math.log(10)) < 0.5


def test_a_head_that_the_weights_bring_stays() -> None:
    """With as many classes as the file's classifier has, it is the file's."""
    stored = TensorFile(weights_path(card_of(NAME, None)))
    model = build(NAME, num_classes=1000)
    assert torch.equal(model.get_submodule("classifier").weight, stored["classifier.weight"].float())

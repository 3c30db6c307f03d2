"""Building a backbone: its name, and which classifier it starts with."""

import math

import pytest
import torch

from vtzoo import build
from vtzoo.backbone import card_of
from vtzoo.bases import weights_path
from vtzoo.errors import NotFound
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


def test_an_unknown_tag_is_named_with_those_that_exist() -> None:
    """A mistyped tag of a known architecture is a person's error, answered with the nearest real one."""
    with pytest.raises(NotFound, match=r"no weights 'augreg_in1k_' of vit_tiny_patch16_224") as caught:
        card_of("vit_tiny_patch16_224.augreg_in1k_")
    assert "vit_tiny_patch16_224.augreg_in21k" in (caught.value.hint or "")

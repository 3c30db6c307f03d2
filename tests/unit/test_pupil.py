"""One trunk with a classifier for each task."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from vtzoo.errors import Mismatch
from vtzoo.outputs import answered, check_parts, depths, outputs, shapes
from vtzoo.pupil import Pupil

ARCHS = {
    "test_vit": {}, "test_efficientnet": {}, "test_resnet": {}, "test_convnext": {}, "mobilenetv4_conv_small_035": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip


def _model(arch: str, classes: int = 3) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=classes, **ARCHS.get(arch, {}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_each_task_is_answered_by_its_own_head(arch: str) -> None:
    """Rows of each task get the logits that the trunk with this head alone gives, and no head stays in the trunk."""
    pupil = Pupil(_model(arch), [3, 5, 2]).eval()
    for p in pupil.heads.parameters():
        nn.init.normal_(p)
    x = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        found = pupil.answers(x, [2, 0, 4], {"logits"})
        for task, part, classes in ((0, slice(0, 2), 3), (2, slice(2, 6), 2)):
            with pupil.at(task) as trunk:
                assert torch.allclose(found[task].logits, trunk(x[part]), atol=1e-5)
            assert found[task].logits.shape[1] == classes
    assert found[1].logits is None
    assert not {n for n in pupil.trunk.state_dict() if n.startswith(pupil.places)}


def test_classifiers_have_the_trunks_names_and_start_small() -> None:
    """They load into a stock model of as many classes; a task alone keeps its classifier in the trunk."""
    pupil = Pupil(_model("test_vit"), [3, 5])
    heads = pupil.classifiers(["pets", "cars"])
    stock = timm.create_model("test_vit", num_classes=5)
    stock.load_state_dict({**pupil.trunk.state_dict(), **heads["cars"]})
    assert heads["cars"]["head.weight"].std() < 0.02
    alone = Pupil(model := _model("test_vit"), [3])
    assert alone.trunk.head is model.head
    assert not alone.places
    assert alone.classifiers([]) == {}


def test_gradients_reach_the_heads_that_answered_and_the_trunk() -> None:
    """A batch of two of three tasks trains their heads and the trunk, and leaves the third head alone."""
    pupil = Pupil(_model("test_efficientnet"), [3, 5, 2]).train()
    answers = pupil.answers(torch.randn(4, 3, 64, 64), [2, 2, 0], {"logits", "features"})
    sum(a.logits.square().sum() for a in answers[:2]).backward()
    assert all(p.grad is not None for head in list(pupil.heads)[:2] for p in head.parameters())
    assert all(p.grad is None for p in pupil.heads[2].parameters())
    assert any(p.grad is not None for p in pupil.trunk.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_parts_of_a_network_give_what_it_gives(arch: str) -> None:
    """Logits beside features and maps are the network's own; shapes say what comes out, the last map among the deepest."""
    model = _model(arch).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, whole = outputs(model, x, {"logits", "features", "maps"}), model(x)
    assert torch.allclose(found.logits, whole, atol=1e-4 * whole.abs().max().item())
    told = shapes(model, (3, 64, 64), {"features", "maps"})
    assert told.features == found.features.shape[1]
    assert told.maps == tuple(tuple(m.shape[1:]) for m in found.maps)
    assert depths(model, 4)[-1] == len(model.feature_info) - 1
    check_parts(model, (3, 64, 64), arch)


def test_a_distillation_token_answers_apart_while_it_learns() -> None:
    """In training the two answers differ, in evaluation both are their mean."""
    model = _model("deit_tiny_distilled_patch16_224").train()
    model.set_distilled_training(True)
    x = torch.randn(2, 3, 64, 64)
    own = outputs(model, x, {"logits", "token"})
    assert not torch.allclose(own.logits, own.token)
    both = outputs(model.eval(), x, {"logits", "token"})
    assert torch.allclose(both.logits, (own.logits + own.token) / 2, atol=1e-5)
    assert torch.equal(both.logits, answered(model, model.forward_features(x))[1])


def test_what_acts_on_a_network_as_a_whole_is_seen() -> None:
    """A hook on the root changes what the network gives, but not its parts: refused, since it would not be taught."""
    model = _model("test_vit").eval()
    model.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    with pytest.raises(Mismatch, match="as a whole"):
        check_parts(model, (3, 160, 160), "it")


def test_a_network_without_maps_says_so() -> None:
    """Maps are only had where timm gives them."""
    with pytest.raises(Mismatch, match="no maps"):
        depths(nn.Linear(2, 2), 4)

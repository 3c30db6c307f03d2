"""limits.py: what a model that carries certain deltas refuses, and lets go again."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from tests import families
from tests.contract import cases
from vtzoo import registry
from vtzoo.errors import Mismatch, ShapeMismatch, UsageError
from vtzoo.live import attach, detach, extract, inject

GRID = ["dtl[fusion=3,start=0]", "vit-adapter", "sa2vp"]


def elastic() -> nn.Module:
    """A ViT for 64 x 64 pixels that takes other sizes as they come."""
    return timm.create_model("test_vit", num_classes=3, dynamic_img_size=True, img_size=64)


@pytest.mark.parametrize("spec", GRID)
def test_images_of_another_size_are_refused(spec: str) -> None:
    """More patches, as many in another grid, attached as well as fresh, copied and pickled; its own size runs."""
    model = inject(elastic(), spec)
    saved = extract(model, tasks=())
    attached = attach(elastic(), saved, task="", check=False)
    own = torch.randn(2, 3, 64, 64)
    for one in (model.eval(), attached, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for size in ((48, 80), (128, 32), (96, 64)):
            with pytest.raises(ShapeMismatch, match=rf"{spec[:3]}.*64x64 pixels.*{size[0]}x{size[1]}"):
                one(torch.randn(1, 3, *size))
        one(own)


@pytest.mark.parametrize("spec", GRID)
def test_detach_lets_go(spec: str) -> None:
    """Without the delta the network takes any size again, bit for bit."""
    plain = elastic()
    model = detach(inject(copy.deepcopy(plain), spec))
    x = torch.randn(1, 3, 48, 80)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("spec", ["lora", "convpass", "mona", "adapter", "vpt-deep", "dtl"])
def test_other_methods_take_other_sizes(spec: str) -> None:
    """What needs no grid gives on another size what the same tensors give on a network of that size."""
    here, there = families.build("dinov3"), families.build("dinov3", img_size=(48, 40))
    there.load_state_dict(here.state_dict())
    for model in (inject(here, spec), inject(there, spec)):
        families.perturb(cases.tensors_of(model))
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    assert torch.allclose(here.eval()(x), there.eval()(x), atol=1e-12)


@pytest.mark.parametrize("spec", ["vpt-shallow", "sa2vp", "gated-vpt", "vqt"])
def test_intermediates_with_foreign_tokens_are_refused(spec: str) -> None:
    """timm would take prompts between the blocks for patches, or crash; after detach it is timm's own again."""
    model, x = inject(families.build("vit"), spec), families.batch("vit")
    with pytest.raises(UsageError, match=spec):
        model.forward_intermediates(x)
    assert detach(model).forward_intermediates(x)


def test_a_function_of_ones_own_stays() -> None:
    """Whoever has put a forward_intermediates of his own on a model finds it there after detach."""
    model = families.build("vit")
    model.forward_intermediates = own = lambda x: x
    assert inject(model, "sa2vp").forward_intermediates is own
    assert detach(model).forward_intermediates is own


@pytest.mark.parametrize("method", [m for m in registry.names("methods") if m != "noah"])
def test_intermediates_are_the_features_or_refused(method: str) -> None:
    """Of every method: the last of the intermediates are the features, and each is of the patches alone."""
    try:
        model = inject(families.build("vit"), method, batches=families.labelled("vit"))
    except (Mismatch, UsageError):
        assert cases.SUPPORT[method]["vit"] not in ("folds", "live")
        return
    families.perturb(cases.tensors_of(model))
    x = families.batch("vit")
    try:
        final, parts = model.eval().forward_intermediates(x, output_fmt="NLC")
    except UsageError as refusal:
        assert "forward_features" in refusal.hint or "side" in str(refusal) or "network" in str(refusal)
        return
    assert torch.equal(final, model.forward_features(x))
    assert {p.shape for p in parts} == {p.shape for p in detach(model).forward_intermediates(x, output_fmt="NLC")[1]}

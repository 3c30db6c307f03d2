"""lora beside PEFT's, in float64: the same A and B give the same output, unfolded and folded."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests import families
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.live import extract, inject

peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 5.0
CASES = {
    "vit": f"lora[rank={RANK},alpha={ALPHA}]",
    "vit-qkv": f"lora[rank={RANK},alpha={ALPHA},targets=qkv]",
    "swin": f"lora[rank={RANK},alpha={ALPHA}]",
    "resnet": f"lora[rank={RANK},alpha={ALPHA}]",
    "convnext-pointwise": f"lora[rank={RANK},alpha={ALPHA},targets=linear]",
}


def _ours(family: str, spec: str) -> nn.Module:
    model = inject(families.build(family), spec)
    families.perturb(tensors_of(model))
    return model


def _theirs(family: str, tensors: dict[str, Tensor]) -> nn.Module:
    """PEFT's LoRA on the same layers of the same net, with the same A and B."""
    sites = sorted({n.rpartition(".lora.")[0] for n in tensors})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sites, lora_dropout=0.0)
    model = peft.get_peft_model(families.build(family), config).double().eval()
    layers = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for site in sites:
            down, up = layers[site].lora_A["default"].weight, layers[site].lora_B["default"].weight
            down.copy_(tensors[f"{site}.lora.A"].reshape(down.shape))
            up.copy_(tensors[f"{site}.lora.B"].reshape(up.shape))
    return model


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.fixture(params=sorted(CASES))
def pair(request):
    """Family, images, our model and PEFT's."""
    family = request.param.split("-")[0]
    ours = _ours(family, CASES[request.param])
    return family, families.batch(family), ours, _theirs(family, tensors_of(ours))


@torch.no_grad()
def test_attached_outputs_agree(pair) -> None:
    """Unfolded, both give the same logits, which are not the base's."""
    family, x, ours, theirs = pair
    assert _difference(ours(x), theirs(x)) <= 1e-12
    assert _difference(ours(x), families.build(family)(x)) > 1e-3


@torch.no_grad()
def test_folded_outputs_and_weights_agree(pair) -> None:
    """Folded, both give the same weights and logits, and those of the unfolded model."""
    family, x, ours, theirs = pair
    live = ours(x)
    folded = dict(fold(families.build(family).state_dict(), extract(ours)))
    plain = families.build(family)
    plain.load_state_dict(folded)
    merged = theirs.merge_and_unload()
    assert all(_difference(folded[n], t) <= 1e-12 for n, t in merged.state_dict().items() if t.abs().max() > 0)
    assert _difference(live, plain(x)) <= 1e-12
    assert _difference(live, merged(x)) <= 1e-12


def test_start_is_the_same_distribution() -> None:
    """A fresh A is Kaiming-uniform with PEFT's bound 1 / sqrt(in), B is zero, so both start as the base."""
    model = inject(families.build("vit"), "lora[rank=16,targets=fc1]")
    tensors = tensors_of(model)
    bound = 1 / math.sqrt(32)
    for name, value in tensors.items():
        if name.endswith(".A"):
            assert bound * 0.95 < value.abs().max() <= bound
            assert abs(value.std() - bound / math.sqrt(3)) < 0.1 * bound
        else:
            assert not value.any()


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2", "dinov3"])
def test_peft_is_dead_where_ours_lives(family: str) -> None:
    """These attentions read qkv's weight and never call it: PEFT's LoRA there has no effect and no gradient; ours has."""
    x = families.batch(family)
    with torch.no_grad():
        bare = families.build(family)(x)
    ours = _ours(family, f"lora[rank={RANK},alpha={ALPHA},targets=qkv]")
    theirs = _theirs(family, tensors_of(ours))
    with torch.no_grad():
        assert torch.equal(theirs(x), bare)
        assert _difference(bare, ours(x)) > 1e-3
    ours(x).sum().backward()
    assert all(t.grad.abs().max() > 0 for t in tensors_of(ours).values())
    assert any(p.requires_grad for p in theirs.parameters())
    assert not theirs(x).requires_grad
    with torch.no_grad():  # and merging what had no effect changes the output after all
        assert _difference(bare, theirs.merge_and_unload()(x)) > 1e-3

"""Smaller networks out of larger ones, without what their task doesn't depend on."""

from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vtzoo import knobs, slimming
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.probing import work
from vtzoo.slimming import Slim, slimmed

ARCH = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "layer scale": {"init_values": 0.1}, "registers": {"reg_tokens": 2}, "normed queries": {"qk_norm": True},
    "mean of patches": {"class_token": False, "global_pool": "avg"}, "inner norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no qkv bias": {"qkv_bias": False},
}  # fmt: skip


def _network(**more: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=5, **{**ARGS, **more}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.requires_grad_(False)


def _batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 3, 32, 32, generator=draw), torch.arange(12) % 3) for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_units_in_another_order_are_the_same_function(kind: str) -> None:
    """Hidden units, heads and channels in the order of their importance give the network's own outputs, and every order changes something."""
    model = _network(**KINDS[kind])
    frame = slimming._frame(model)
    ranks = slimming._ranks(model, frame, _batches())
    arranged = slimming._arranged(model, frame, ranks, [])
    x = _batches()[0][0]
    with torch.no_grad():
        assert torch.allclose(arranged(x), model(x), atol=1e-4)
    assert not torch.equal(arranged.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert {k: len(g) for k, g in frame.groups.items()} == {"hidden": 4, "width": 5}
    assert all(w.diff().max() <= 0 for kind in ranks.weights.values() for w in kind if len(w) > 1)


RESNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet18", {"channels": [16, 24, 32, 40], "layers": [2, 3, 2, 1]}),
    "bottleneck": ("resnet50", {"channels": [16, 24, 32, 40], "layers": [2, 1, 3, 2]}),
    "wide": ("wide_resnet50_2", {"channels": [16, 24, 32, 40], "layers": [2, 1, 2, 1]}),
    "pooled shortcut, deep stem": ("resnet50d", {"channels": [16, 24, 32, 40], "layers": [2, 1, 3, 2]}),
}
CONVNEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (arch, {"dims": [16, 24, 32, 40], "depths": [2, 1, 3, 2]})
    for kind, arch in {
        "plain": "convnext_tiny",
        "1x1 convolutions": "convnext_atto",
        "responses normalised": "convnextv2_atto",
    }.items()
}
CNNS = {**RESNETS, **{f"convnext, {kind}": how for kind, how in CONVNEXTS.items()}}


def _cnn(kind: str, classes: int = 5) -> Any:
    torch.manual_seed(0)
    arch, args = CNNS[kind]
    if kind == "basic":
        args = {**args, "channels": [64, 24, 32, 40]}
    model = timm.create_model(arch, num_classes=classes, **args).eval()
    with torch.no_grad():
        for n, t in model.state_dict().items():
            if t.is_floating_point():
                t.add_(0.3 * torch.rand_like(t) if "running_var" in n or "bn" in n else 0.05 * torch.randn_like(t))
    return model.requires_grad_(False), arch, args


@pytest.mark.parametrize("kind", CNNS)
@pytest.mark.parametrize("classes", [5, 0])
def test_convolutional_networks_are_taken_apart_too(kind: str, classes: int) -> None:
    """Channels in another order are the same function, statistics of norms included; budgets are kept, and timm builds what comes out."""
    model, arch, args = _cnn(kind, classes)
    batches = [(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]
    frame = slimming._frame(model)
    ranks = slimming._ranks(model, frame, batches)
    x = batches[0][0]
    with torch.no_grad():
        arranged, own = slimming._arranged(model, frame, ranks, [])(x), model(x)
    if not classes:  # the features themselves are in another order
        arranged, own = arranged.sort().values, own.sort().values
    assert (arranged - own).abs().max() < 1e-4 * own.abs().max()
    made, own = slimmed(model, arch, args, Slim(params=0.7), batches)
    params, macs = (b / a for a, b in zip(work(model, (3, 64, 64)), work(made, (3, 64, 64)), strict=True))
    assert params <= 0.7
    assert macs < 1
    again = timm.create_model(arch, num_classes=classes, **own)
    again.load_state_dict(made.state_dict())
    with pytest.raises(UsageError, match="hidden units"):
        slimmed(model, arch, args, Slim(hidden=0.5), batches)


def test_a_resnet_whose_norms_have_groups_is_refused() -> None:
    """Channels in another order would be in other groups, and another function."""
    args = {"channels": [32, 32, 32, 32], "layers": [1, 1, 1, 1]}
    with pytest.raises(ShapeMismatch, match="this ResNet is none"):
        slimmed(timm.create_model("resnet50_gn", **args), "resnet50_gn", args, Slim(depth=3), [])


@torch.no_grad()
def test_dead_channels_and_blocks_of_a_resnet_go() -> None:
    """What the next convolution doesn't read, and a block that adds nothing, are left out, and the outputs stay."""
    model, arch, args = _cnn("bottleneck")
    for name, block in model.named_modules():
        if name.count(".") == 1 and name.startswith("layer"):
            for i in (1, 2):
                width = getattr(block, f"conv{i}").out_channels
                getattr(block, f"conv{i + 1}").weight[:, torch.randperm(width)[: width // 8 * 4]] = 0
    model.layer3[1].bn3.weight.zero_()
    model.layer3[1].bn3.bias.zero_()
    batches = [(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]
    made, own = slimmed(model, arch, args, Slim(depth=7), batches)
    assert list(own["layers"]) == [2, 1, 2, 2]
    x = batches[0][0]
    assert (made(x) - model(x)).abs().max() < 1e-4 * model(x).abs().max()


@torch.no_grad()
def test_a_dead_block_of_a_convnext_goes() -> None:
    """One that adds nothing is left out, the channels come in another order, and the outputs stay."""
    model, arch, args = _cnn("convnext, responses normalised")
    for name in ("weight", "bias"):
        model.stages[2].blocks[1].mlp.fc2.get_parameter(name).zero_()
    batches = [(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]
    made, own = slimmed(model, arch, args, Slim(depth=7), batches)
    assert list(own["depths"]) == [2, 1, 2, 2]
    x = batches[0][0]
    assert (made(x) - model(x)).abs().max() < 1e-4 * model(x).abs().max()


@torch.no_grad()
def test_what_does_nothing_is_left_out_and_nothing_changes() -> None:
    """A block, half of the hidden units and one head of each block that add nothing go; the smaller network computes the same."""
    model = _network(class_token=False, global_pool="avg")
    for i, block in enumerate(model.blocks):
        dead = torch.randperm(768, generator=torch.Generator().manual_seed(i))[:384]
        block.mlp.fc2.weight[:, dead] = 0
    for name in ("attn.proj", "mlp.fc2"):
        layer = model.blocks[2].get_submodule(name)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    made, args = slimmed(
        model, ARCH, {**ARGS, "class_token": False, "global_pool": "avg"}, Slim(depth=3, hidden=0.5), _batches()
    )
    assert (args["depth"], args["mlp_ratio"], len(made.blocks)) == (3, 2.0, 3)
    x = _batches()[1][0]
    assert torch.allclose(made(x), model(x), atol=1e-4)
    assert torch.equal(made.blocks[2].norm1.weight, model.blocks[3].norm1.weight[_order(model)])


def _order(model: Any) -> Tensor:
    return slimming._ranks(model, slimming._frame(model), _batches()).orders["width"][-1]


def test_the_head_that_matters_least_goes() -> None:
    """Of three heads the one whose outputs nobody reads is left out in each block, wherever it stands."""
    model = _network()
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.attn.proj.weight[:, 64 * (i % 3) : 64 * (i % 3 + 1)] = 0
    ranks = slimming._ranks(model, slimming._frame(model), _batches())
    for i in range(4):
        assert ranks.orders["width"][i][-1] == i % 3
        assert ranks.weights["width"][i][-1] < 0.2 * ranks.weights["width"][i][-2]


@pytest.mark.parametrize("wish", [Slim(params=0.6), Slim(params=0.25), Slim(macs=0.5), Slim(macs=0.8, params=0.5)])
def test_budgets_are_kept(wish: Slim) -> None:
    """Parameters and multiply-adds are within their shares, by torch's own count, and not far below."""
    model = _network()
    made, args = slimmed(model, ARCH, ARGS, wish, _batches())
    shares = [b / a for a, b in zip(work(model, (3, 32, 32)), work(made, (3, 32, 32)), strict=True)]
    allowed = [wish.params or 1.0, wish.macs or 1.0]
    assert all(s <= a for s, a in zip(shares, allowed, strict=True))
    assert max(s / a for s, a in zip(shares, allowed, strict=True)) > 0.6
    again = timm.create_model(ARCH, num_classes=5, **args)
    again.load_state_dict(made.state_dict())


def test_the_network_and_the_images_stay_as_they_were() -> None:
    """Nothing of the source changes, neither numbers nor modes."""
    model = _network().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    slimmed(model, ARCH, ARGS, Slim(depth=2), _batches())
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Slim(depth=9), "not 9"),
        (Slim(params=0.001), "as small"),
        (Slim(macs=0.001), "as small"),
    ],
)
def test_what_can_not_be_is_refused(wish: Slim, said: str) -> None:
    """More than there is, and budgets that no network of the kind keeps."""
    with pytest.raises(UsageError, match=said) as refusal:
        slimmed(_network(), ARCH, ARGS, wish, _batches())
    assert refusal.value.hint


@pytest.mark.parametrize(
    "knobs_",
    [
        {},
        {"params": "0.5", "depth": "3"},
        {"params": "1.5"},
        {"macs": "0"},
        {"depth": "0"},
        {"heads": "3"},
        {"width": "3"},
    ],
)
def test_wishes_that_are_none_are_refused(knobs_: dict[str, str]) -> None:
    """No wish, a budget with sizes, shares out of range, unknown names."""
    with pytest.raises((UsageError, ValidationError)):
        knobs.decode(Slim, knobs_, "slim")


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_vit3", "seresnext26d_32x4d"])
def test_other_networks_say_so(arch: str) -> None:
    """Only plain networks of three kinds are taken apart; the refusal names what was given, and another way."""
    with pytest.raises(ShapeMismatch, match="slim takes") as refusal:
        slimmed(timm.create_model(arch, num_classes=3), arch, {}, Slim(params=0.5), _batches())
    assert "weight-selection" in refusal.value.hint

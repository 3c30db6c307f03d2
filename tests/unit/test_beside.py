"""Side networks that change nothing in the network that they lean on: what they read is kept, and nothing else is."""

import pytest
import timm
import torch

import vtzoo
from vtzoo import beside
from vtzoo.devices import channels_last
from vtzoo.prefix import share

SIZES = {"test_vit": (3, 32, 32), "test_efficientnet": (3, 64, 64)}


def grown(arch: str, method: str) -> torch.nn.Module:
    """A tiny network with a delta that has learned something."""
    torch.manual_seed(0)
    more = {"img_size": 32} if "vit" in arch else {}
    model = vtzoo.inject(timm.create_model(arch, num_classes=5, **more), method)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return channels_last(model).eval()


@pytest.mark.parametrize(
    ("arch", "method", "hosts", "spared"),
    [
        ("test_vit", "lst", 7, 0.9),  # six blocks, and the norm at the end
        ("test_vit", "vqt", 7, 0.9),
        ("test_vit", "dtl", 4, 0.6),  # the later blocks are given what the side network made
        ("test_efficientnet", "lst", 6, 0.69),
    ],
)
def test_what_is_read_is_kept(arch: str, method: str, hosts: int, spared: float) -> None:
    """The rest gives the network's own outputs and gradients, whatever the trained numbers have become since."""
    model = grown(arch, method)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = beside.find(model, SIZES[arch])
    assert found is not None
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert len(found.hosts) == hosts
    numbers = {True: 0, False: 0}
    for p in model.parameters():
        numbers[p.requires_grad] += p.numel()
    assert spared < share(model, found) <= numbers[False] / sum(numbers.values())  # what is trained is never spared
    x = torch.randn(3, *SIZES[arch])
    features = found.features(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.mul_(1.3).add_(0.1)
    grads = [torch.autograd.grad(out.square().sum(), trained) for out in (model(x), found.rest(model, features))]
    assert torch.equal(model(x), found.rest(model, features))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))
    assert all(g.abs().max() > 0 for g in grads[1])


@pytest.mark.parametrize(
    "method", ["lora", "ssf", "adapter", "bitfit", "vpt-deep", "lst+bitfit", "vit-adapter", "side-tuning"]
)
def test_what_changes_the_network_keeps_nothing(method: str) -> None:
    """Nor does a side network that is given the images, or one beside a method that changes the blocks; as little is left hanging."""
    model = grown("test_vit", method)
    assert beside.find(model, SIZES["test_vit"], 0.5) is None
    assert not any("_owned" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def test_slices_of_kept_numbers_round_as_a_layers_own() -> None:
    """At the width of a ViT-S products of strided rows round otherwise; the rest is given rows as a layer lays them out."""
    torch.manual_seed(0)
    args = {"img_size": 32, "embed_dim": 384, "num_heads": 6, "depth": 3}
    model = vtzoo.inject(timm.create_model("vit_tiny_patch16_224", num_classes=5, **args), "lst")
    found = beside.find(model, (3, 32, 32), 0.5)
    assert found is not None
    assert len(found.hosts) == 4

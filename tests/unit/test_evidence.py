"""What images tell of a network, beside hooks, loops and numpy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import families
from vtzoo.evidence import fisher, grams


def batches(family: str, count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images in two batches, without labels that mean something."""
    images = families.batch(family, count)
    return [(images[:2], torch.full((2,), -1)), (images[2:], torch.full((count - 2,), -1))]


@pytest.mark.parametrize("family", ["vit", "beit", "swin", "resnet", "convnext"])
def test_grams_are_those_of_what_hooks_see(family):
    """X' X of every linear and dense convolution, over the number of images, as a hook on the module sees its input."""
    model, wanted = families.build(family), {}

    def hook(name, module):
        def see(_module, args):
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
            rows = x.reshape(-1, x.shape[-1]).double()
            wanted[name] = wanted.get(name, 0) + rows.T @ rows / 5

        return module.register_forward_pre_hook(see)

    dense = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    ]
    handles = [hook(f"{n}.weight", m) for n, m in dense]
    with torch.no_grad():
        model.eval()
        for images, _ in batches(family):
            model(images)
    for handle in handles:
        handle.remove()
    found = grams(model, batches(family))
    assert wanted.keys() <= found.keys()  # BEiT's own product of its fused weight has no module that is called
    assert family != "beit" or any("qkv" in n for n in found.keys() - wanted.keys())
    for name, gram in wanted.items():
        assert torch.allclose(found[name].double(), gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max())), name


def test_a_weight_that_is_changed_before_its_use_has_no_gram():
    """Weight-standardised convolutions multiply by another matrix than they hold."""
    model = families.build("nfnet")
    assert not any(".conv" in n for n in grams(model, batches("nfnet")))


def test_fisher_is_the_mean_squared_gradient():
    """Two classes that are equally likely: the gradient's square is the same for either label, so that the draw is without effect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight[1] = model[1].weight[0]
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    found = fisher(model, [(images, torch.zeros(4))])["1.weight"]
    wanted = (images.flatten(1) / 2).square().mean(0)
    assert torch.allclose(found.double(), wanted.expand(2, -1), rtol=1e-5)


def test_fisher_draws_from_the_prediction():
    """A sure network's information is small; an image alone gives what the image in a batch adds; flags and modes stay."""
    model = families.build("vit").train()
    model.cls_token.requires_grad_(False)
    images = families.batch("vit", 3)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    whole = fisher(model, [(images, torch.zeros(3))], seed=4)
    parts = fisher(model, [(x[None], torch.zeros(1)) for x in images], seed=4)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.training
    assert all(f.ge(0).all() and f.isfinite().all() for f in whole.values())
    with torch.no_grad():
        model.head.bias[0] += 50
    sure = fisher(model, [(images, torch.zeros(3))], seed=4)
    assert sum(f.sum() for f in sure.values()) < 1e-6 * sum(f.sum() for f in whole.values())

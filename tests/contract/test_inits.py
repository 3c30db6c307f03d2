"""Net2Net and weight selection on every family: the same function, the same weights back, or a refusal with its reason."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.mobilenetv3 import _create_mnv3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from tests import families
from tests.contract.init_cases import WIDER, apart, refused
from vtzoo.initial import started
from vtzoo.sketch import state_of

LOUD = {
    "metaformer": "can't be made to add nothing",  # its shortcut has a scale, too
    "repvgg": "can't be made to add nothing",  # its shortcut has a BatchNorm
    "nfnet": "would give other outputs",  # how much a block is scaled by depends on its place
}
QUICK = {"vit", "vit-reg", "deit3", "beit", "swinv2", "convnext", "resnet", "efficientnet", "mobilenetv4"}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def quick(names: Mapping[str, Any] | list[str]) -> list[Any]:
    """Families, those that most others resemble among the quick tests."""
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


def maxvit(k: int) -> nn.Module:
    """Attention whose fused qkv goes head by head; of one head in the small one's first stage."""
    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4))
    cfg = MaxxVitCfg(embed_dim=(8 * k, 16 * k), depths=(1, 1), block_type=("M", "M"), stem_width=8 * k, transformer_cfg=transformer)  # fmt: skip
    return MaxxVit(cfg, img_size=32, num_classes=5)


def regnet(k: int) -> nn.Module:
    """Groups of a fixed width, so that there are more of them."""
    return RegNet(RegNetCfg(depth=6, w0=8 * k, wa=8.0 * k, wm=2.0, group_size=8, stem_width=8 * k, se_ratio=0.25), num_classes=5)  # fmt: skip


def bottleneck(k: int) -> nn.Module:
    """Inner channels alone grow."""
    return ResNet(Bottleneck, (1, 2, 1, 1), channels=(8, 8, 16, 16), base_width=32 * k, stem_width=8, num_classes=5)  # type: ignore[arg-type]


def mobilenetv3(k: int) -> nn.Module:
    """Inverted bottlenecks with squeeze-and-excite."""
    stages = [["ds_r1_k3_s1_e1_c8_nre"], ["ir_r2_k5_s2_e3_c16_se0.25_nre"], ["ir_r1_k5_s2_e6_c24_se0.25"], ["cn_r1_k1_s1_c32"]]  # fmt: skip
    return _create_mnv3("mobilenetv3_small_100", block_args=decode_arch_def(stages), stem_size=8, num_features=40, num_classes=5, round_chs_fn=partial(round_channels, multiplier=float(k)))  # fmt: skip


def hidden(k: int) -> nn.Module:
    """A ViT's hidden width, to one that is no multiple."""
    return timm.create_model("vit_tiny_patch16_224", mlp_ratio=(2.0, 3.5)[k - 1], **SMALL)


def gated(k: int) -> nn.Module:
    """A gated unit, whose two halves grow each by itself."""
    layer = timm.layers.SwiGLUPacked
    return timm.create_model("vit_small_patch14_dinov2", mlp_layer=layer, mlp_ratio=(2.0, 3.5)[k - 1], **SMALL)


BUILT: list[Callable[[int], nn.Module]] = [maxvit, regnet, bottleneck, mobilenetv3, hidden, gated]


def pair(build: Callable[[int], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """The small one and the large one in float64, and images."""
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = build(1).double(), build(2).double()
    for seed, model in enumerate(models):
        families.randomise(model.eval(), x, seed)
    return *models, x


@pytest.mark.parametrize("name", quick(families.names()))
def test_deeper_is_the_same_function(name: str) -> None:
    """New blocks add nothing: outputs are equal, bit for bit, or it is refused with the reason."""
    small, large = families.build(name), families.build(name, seed=5, **families.FAMILIES[name].deeper)
    if name in LOUD:
        refused(large, small, "net2net", LOUD[name])
        return
    assert torch.equal(started(large, small, "net2net")(families.batch(name)), small(families.batch(name)))


@pytest.mark.parametrize("name", quick(WIDER))
def test_wider_is_the_same_function(name: str) -> None:
    """Of twice the width, in float64 and float32, but for rounding."""
    for dtype, near in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        small, large = families.build(name, dtype=dtype), families.build(name, seed=5, dtype=dtype, **WIDER[name])
        x = families.batch(name, dtype=dtype)
        assert apart(small(x), started(large, small, "net2net")(x)) < near


@pytest.mark.parametrize("build", BUILT)
def test_hidden_channels_of_any_number_and_groups_keep_the_function(build: Callable[[int], nn.Module]) -> None:
    """Also where heads stand first, groups grow in number, and sizes are no multiples."""
    small, large, x = pair(build)
    assert apart(small(x), started(large, small, "net2net")(x)) < 1e-13


@pytest.mark.parametrize("name", quick([n for n in WIDER if n not in ("efficientnet", "mobilenetv4")]))
def test_selecting_from_a_widened_network_gives_the_small_one(name: str) -> None:
    """Every second of doubled channels, of each head and part: what gives is as it was, what sums half as large."""
    small, large = families.build(name), families.build(name, seed=5, **WIDER[name])
    again = state_of(started(families.build(name, seed=9), started(large, small, "net2net"), "weight-selection"))
    odd = [n for n, t in state_of(small).items() if t.is_floating_point() and not torch.equal(again[n], t)]
    assert all(torch.equal(2 * again[n], state_of(small)[n]) for n in odd)
    assert odd
    assert not any(again[n].ndim < 2 for n in odd)

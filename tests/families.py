"""Tiny backbones, one per family that vtzoo claims, shared by the tests and by scripts/make_support.py.

Every floating parameter and every BatchNorm statistic is drawn at random (seeded): many networks start with branches
at zero, where a dead delta would look alive and a wrong fold would look right. float64, so that 1e-10 means something.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import _create_effnet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, Pooling, SepConv, _create_metaformer
from timm.models.mlp_mixer import _create_mixer
from timm.models.mobilenetv3 import _create_mnv3
from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn

from vtzoo.dual import ARCH as DUAL

CLASSES = 5
_TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}


@dataclass(frozen=True)
class Family:
    """How to build one.

    Attributes:
        arch: timm's registry name, or a function like the registered ones where those fix what must be tiny.
        args: keyword arguments that make it tiny.
        size: of a test image, pixels [height, width].
        deeper: arguments of the same net with more blocks.
        larger: arguments of the same net for another image size, where that changes tensors or maps; else None.
        kind: what its blocks carry, tokens or maps.
    """

    arch: str | Callable[..., nn.Module]
    args: Mapping[str, Any]
    size: tuple[int, int]
    deeper: Mapping[str, Any]
    larger: Mapping[str, Any] | None = None
    kind: str = "tokens"


def _mixer(**args: Any) -> nn.Module:
    """timm's own entry points for Mixers fix their width."""
    return _create_mixer("mixer_b16_224", **args)


def _efficientnet(*, repeats: int = 2, **args: Any) -> nn.Module:
    """EfficientNet's units (separable, fused, inverted with squeeze-and-excite), padded as TensorFlow does."""
    stages = [
        ["ds_r1_k3_s1_e1_c8"],
        ["er_r1_k3_s2_e4_c12"],
        [f"ir_r{repeats}_k5_s2_e4_c16_se0.25"],
        ["ir_r1_k3_s2_e4_c24_se0.25"],
    ]
    return _create_effnet(
        "tf_efficientnet_b0",
        block_args=decode_arch_def(stages),
        stem_size=8,
        num_features=40,
        act_layer=nn.SiLU,
        pad_type="same",
        **args,
    )


def _mobilenetv4(*, repeats: int = 1, **args: Any) -> nn.Module:
    """MobileNetV4's own units (extra depthwise, inverted bottleneck, ConvNeXt-like, multi-query attention), one each."""
    stages = [
        ["cn_r1_k3_s2_e1_c12", "cn_r1_k1_s1_e1_c12"],
        ["uir_r1_a5_k5_s2_e3_c16", f"uir_r{repeats}_a0_k3_s1_e2_c16", "uir_r1_a3_k0_s1_e4_c16"],
        ["uir_r1_a3_k3_s2_e4_c24", "mqa_r1_k3_h2_s1_v2_d8_c24", "cn_r1_k1_s1_c48"],
    ]
    return _create_mnv3(
        "mobilenetv4_hybrid_medium", block_args=decode_arch_def(stages), stem_size=8, num_features=64, head_bias=False, head_norm=True,
        act_layer=nn.ReLU, layer_scale_init_value=1.0, **args,
    )  # fmt: skip


def _maxvit(*, depths: tuple[int, ...] = (2, 2), **args: Any) -> nn.Module:
    """MaxViT's block: an inverted bottleneck, then attention in windows and on a grid, with relative positions."""
    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4))
    cfg = MaxxVitCfg(embed_dim=(8, 16), depths=depths, block_type=("M", "M"), stem_width=8, transformer_cfg=transformer)
    return MaxxVit(cfg, **args)


def _regnet(*, depth: int = 6, **args: Any) -> nn.Module:
    """RegNetY: grouped convolutions with squeeze-and-excite, in four stages."""
    return RegNet(RegNetCfg(depth=depth, w0=8, wa=8.0, wm=2.0, group_size=8, stem_width=8, se_ratio=0.25), **args)


def _repvgg(*, depth: int = 1, **args: Any) -> nn.Module:
    """RepVGG before it is reparameterized: a 3x3, a 1x1 and an identity side by side."""
    blocks = tuple(ByoBlockCfg(type="rep", d=d, c=c, s=2) for d, c in ((1, 8), (depth + 1, 16), (1, 24)))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), **args)


def _mobilevit(*, depth: int = 1, **args: Any) -> nn.Module:
    """MobileViT: inverted bottlenecks, then a transformer over unfolded patches."""
    last = _mobilevit_block(d=1, c=16, s=2, transformer_dim=16, transformer_depth=depth, patch_size=2, br=2.0)
    cfg = ByoModelCfg(
        blocks=(_inverted_residual_block(d=1, c=8, s=2, br=2.0), last), stem_chs=8, stem_type="3x3", stem_pool="",
        downsample="", act_layer="silu", num_features=24,
    )  # fmt: skip
    return ByobNet(cfg, **args)


def _metaformer(*, depths: tuple[int, ...] = (1, 1, 1, 1), **args: Any) -> nn.Module:
    """One stage each of PoolFormer's pooling and CAFormer's separable convolutions, and two of its attention."""
    return _create_metaformer(
        "caformer_s18", dims=(8, 16, 32, 64), depths=depths, token_mixers=[Pooling, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2, **args,
    )  # fmt: skip


def _dual(*, num_classes: int = 0, embed_dim: int, **args: Any) -> nn.Module:
    """A dual encoder whose classes are the first letters, its trunk this wide; without its text tower, an image classifier."""
    text = {"width": 16, "heads": 2, "layers": 2, "context_length": 20}
    trunk = {"trunk": "vit_base_patch32_clip_224", "trunk_args": {"embed_dim": embed_dim}}
    own: dict[str, Any] = {**trunk, "embed_dim": 20, "text": text, **args}
    model: Any = timm.create_model(DUAL, num_classes=num_classes, **own)
    return model.speak(tuple("abcde"[:num_classes])) if num_classes and own["text"] else model


def _plain(arch: str, **args: Any) -> Family:
    """A plain transformer on 24 x 32 pixels: a grid of 3 x 4, so that swapped sides show."""
    size = args.pop("img_size", (24, 32))
    larger = {"img_size": tuple(2 * s for s in size)}
    return Family(arch, {"img_size": size, **_TINY, **args}, size, {"depth": 3}, larger)


FAMILIES: dict[str, Family] = {
    "vit": _plain("vit_tiny_patch16_224"),
    "vit-bare": _plain(
        "vit_tiny_patch16_224", qkv_bias=False, proj_bias=False, qk_norm=True, init_values=0.1, no_embed_class=True
    ),
    "vit-gap": _plain("vit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=True),
    "vit-reg": _plain("vit_small_patch14_reg4_dinov2"),
    "deit3": _plain("deit3_small_patch16_224"),
    "deit-dist": _plain("deit_tiny_distilled_patch16_224"),
    "clip": _plain("vit_base_patch32_clip_224"),
    "dual": replace(_plain("vit_base_patch32_clip_224"), arch=_dual),
    "siglip": _plain("vit_base_patch16_siglip_224"),
    "beit": _plain("beit_base_patch16_224"),
    "eva02": _plain("eva02_tiny_patch14_224"),
    "dinov3": _plain("vit_small_patch16_dinov3_qkvb"),
    "cait": _plain("cait_xxs24_224", depth_token_only=1),
    "swin": Family(
        "swin_tiny_patch4_window7_224", {"img_size": 32, **_SWIN}, (32, 32), {"depths": (2, 2)}, {"img_size": 64}
    ),
    "swinv2": Family(
        "swinv2_tiny_window8_256", {"img_size": 32, **_SWIN}, (32, 32), {"depths": (2, 2)}, {"img_size": 64}
    ),
    "pvt": Family(
        "pvt_v2_b0",
        {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "mlp_ratios": (4, 4, 2, 2)},
        (64, 64),
        {"depths": (1, 1, 2, 1)},
    ),
    "hiera": Family(
        "hiera_tiny_224",
        {
            "img_size": (64, 64),
            "embed_dim": 16,
            "num_heads": 1,
            "stages": (1, 2),
            "q_pool": 1,
            "mask_unit_size": (4, 4),
            "mask_unit_attn": (True, False),
        },
        (64, 64),
        {"stages": (1, 3)},
        {"img_size": (128, 128)},
    ),
    "maxvit": Family(_maxvit, {"img_size": 32}, (32, 32), {"depths": (2, 3)}, {"img_size": 64}),
    "mobilevit": Family(_mobilevit, {}, (32, 32), {"depth": 2}),
    "metaformer": Family(_metaformer, {}, (64, 64), {"depths": (1, 1, 2, 1)}),
    "mixer": Family(
        _mixer,
        {"img_size": (24, 32), "patch_size": 8, "embed_dim": 32, "num_blocks": 2},
        (24, 32),
        {"num_blocks": 3},
        {"img_size": 32},
    ),
    "hybrid": Family(
        "vit_tiny_r_s16_p8_224",
        {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2},
        (64, 64),
        {"depth": 3},
        {"img_size": 96},
    ),
    "convnext": Family(
        "test_convnext",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
        (64, 64),
        {"depths": (1, 1, 3, 1)},
        kind="maps",
    ),
    "convnextv2": Family(
        "convnextv2_atto",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
        (64, 64),
        {"depths": (1, 1, 3, 1)},
        kind="maps",
    ),
    "regnet": Family(_regnet, {}, (64, 64), {"depth": 7}, kind="maps"),
    "repvgg": Family(_repvgg, {}, (64, 64), {"depth": 2}, kind="maps"),
    "resnet": Family(
        "test_resnet",
        {"channels": (8, 16, 16, 24), "stem_width": 8, "layers": (2, 1, 1, 1)},
        (64, 48),
        {"layers": (2, 1, 2, 1)},
        kind="maps",
    ),
    "efficientnet": Family(_efficientnet, {}, (49, 64), {"repeats": 3}, kind="maps"),
    "mobilenetv4": Family(_mobilenetv4, {}, (64, 64), {"repeats": 2}, kind="maps"),
    "nfnet": Family(
        "test_nfnet", {"width_factor": 0.5, "depths": (1, 2, 1, 1)}, (64, 64), {"depths": (1, 2, 2, 1)}, kind="maps"
    ),
}


def names() -> list[str]:
    """Every family's name, sorted."""
    return sorted(FAMILIES)


def build(
    name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, classes: int = CLASSES, **changes: Any
) -> nn.Module:
    """A fresh tiny backbone of a family in eval mode; the same arguments give the same bits.

    Args:
        name: of the family.
        dtype: of every floating tensor; values are drawn in float64 and cast.
        seed: of the values.
        classes: of its head; 0 for none.
        changes: timm arguments on top of the family's own, such as those of `Family.deeper`.
    """
    return _clone(_template(name, dtype, seed, classes, tuple(sorted(changes.items()))), {})


def batch(
    name: str, count: int = 2, *, dtype: torch.dtype = torch.float64, size: tuple[int, int] | None = None
) -> Tensor:
    """Random images that a family's backbone takes, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, *(size or FAMILIES[name].size), generator=generator, dtype=torch.float64).to(dtype)


def labelled(name: str, *, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """One batch of random images with labels, two of each class: what methods that choose by gradients want."""
    return [(batch(name, 6, dtype=dtype), torch.arange(6) % 3)]


@torch.no_grad()
def perturb(tensors: Mapping[str, Tensor], *, seed: int = 1, scale: float = 0.1) -> None:
    """Move every tensor of a fresh delta away from its start, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name in (n for n in sorted(tensors) if tensors[n].is_floating_point()):
        value = tensors[name]
        value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * scale)


def _clone(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """What deepcopy gives, five times as fast: own modules, parameters, buffers and dictionaries, the rest shared."""
    if id(module) in made:
        return made[id(module)]
    new = made[id(module)] = type(module).__new__(type(module))
    own = {k: v.copy() if isinstance(v, dict | list) else v for k, v in module.__dict__.items()}
    new.__dict__.update({k: made.get(id(v), v) for k, v in own.items()})  # what refers to the network around it, too
    for name, value in module._parameters.items():
        new._parameters[name] = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
    for name, value in module._buffers.items():
        new._buffers[name] = None if value is None else value.clone()
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _clone(child, made)
    return new


@cache
def _template(
    name: str, dtype: torch.dtype, seed: int, classes: int, changes: tuple[tuple[str, Any], ...]
) -> nn.Module:
    family = FAMILIES[name]
    args = {"num_classes": classes, **family.args, **dict(changes)}
    model = timm.create_model(family.arch, **args) if isinstance(family.arch, str) else family.arch(**args)
    model = model.double().eval()
    size = args.get("img_size", family.size)
    randomise(model, batch(name, 8, size=(size, size) if isinstance(size, int) else size), seed)
    return model.to(dtype)


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Give every parameter and running statistic a random value of a healthy size, drawn by its name alone."""
    for name, value in model.named_parameters():
        noise = _noise(name, value, seed)
        last = name.rpartition(".")[2]
        if "scale" in last or "gain" in last or "gamma" in last or (last == "weight" and value.ndim == 1):
            value.copy_(value.abs().clamp(0.5, 2.0) * (1.0 + 0.2 * noise))
        elif value.ndim >= 2 and last == "weight":
            value.copy_(noise * (1.5 / value[0].numel()) ** 0.5)
        else:
            value.copy_(0.3 * noise)
    norms = {n: m for n, m in model.named_modules() if getattr(m, "running_var", None) is not None}
    for norm in norms.values():  # statistics near those of real activations, or the signal dies on its way
        norm.train().momentum = 1.0
    model(x)
    for name, norm in norms.items():
        norm.eval().momentum = 0.1
        for value in (norm.running_mean, norm.running_var):
            value.mul_(1.0 + 0.1 * _noise(name, value, seed).clamp(-2, 2))
        norm.num_batches_tracked.zero_()


def _noise(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)

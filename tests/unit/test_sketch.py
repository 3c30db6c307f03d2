"""What is read from live networks: the meaning of dimensions, and what makes a block silent."""

import pytest
import timm

from tests import families
from vtzoo.axes import CLASSES, FIXED, IN, KERNEL, OFFSETS, OUT, PATCH, PIXELS, PLACES, Axis
from vtzoo.silence import silent
from vtzoo.sketch import sketched, state_of


@pytest.mark.parametrize("name", families.names())
def test_every_dimension_has_an_axis(name: str) -> None:
    """Of its size, for every tensor of every family."""
    model = families.build(name)
    axes = sketched(model).axes
    assert {n: tuple(a.size for a in own) for n, own in axes.items()} == {n: tuple(t.shape) for n, t in state_of(model).items()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor", "wanted"),
    [
        ("vit", "blocks.0.attn.qkv.weight", [(OUT, 3, 2, 16), (IN, 32)]),
        ("vit", "blocks.0.attn.qkv.bias", [(OUT, 3, 2, 16)]),
        ("vit", "blocks.0.attn.proj.weight", [(OUT, 32), (IN, 2, 16)]),
        ("vit", "blocks.0.mlp.fc1.weight", [(OUT, 128), (IN, 32)]),
        ("vit", "patch_embed.proj.weight", [(OUT, 32), (PIXELS, 3), (PATCH, 8), (PATCH, 8)]),
        ("vit", "pos_embed", [(FIXED, 1), (PLACES, 13), (OUT, 32)]),
        ("vit", "cls_token", [(FIXED, 1), (FIXED, 1), (OUT, 32)]),
        ("vit", "head.weight", [(CLASSES, 5), (IN, 32)]),
        ("vit", "head.bias", [(CLASSES, 5)]),
        ("beit", "blocks.0.attn.q_bias", [(OUT, 2, 16)]),
        ("beit", "blocks.0.attn.relative_position_bias_table", [(OFFSETS, 38), (OUT, 2)]),
        ("siglip", "attn_pool.kv.weight", [(OUT, 2, 2, 16), (IN, 32)]),
        ("siglip", "attn_pool.norm.weight", [(OUT, 32)]),
        ("maxvit", "stages.1.blocks.0.attn_block.attn.qkv.weight", [(OUT, 2, 3, 8), (IN, 16)]),
        ("swin", "layers.1.downsample.reduction.weight", [(OUT, 32), (IN, 4, 16)]),
        ("swinv2", "layers.0.blocks.0.attn.logit_scale", [(OUT, 1), (FIXED, 1), (FIXED, 1)]),
        ("convnext", "stages.0.blocks.0.conv_dw.weight", [(OUT, 8), (FIXED, 1), (KERNEL, 7), (KERNEL, 7)]),
        ("resnet", "layer1.0.conv1.weight", [(OUT, 8), (IN, 16), (KERNEL, 3), (KERNEL, 3)]),
        ("regnet", "s2.b1.conv2.conv.weight", [(OUT, 2, 8), (IN, 8), (KERNEL, 3), (KERNEL, 3)]),
        ("regnet", "s2.b1.conv1.bn.running_mean", [(OUT, 2, 8)]),
        ("mobilenetv4", "blocks.2.1.attn.query.proj.weight", [(OUT, 2, 8), (IN, 24), (KERNEL, 1), (KERNEL, 1)]),
    ],
)
def test_axes(name: str, tensor: str, wanted: list[tuple[object, ...]]) -> None:
    """Attention by heads, gated and merged things apart, groups, positions, pixels and classes."""
    found = sketched(families.build(name)).axes[tensor]
    assert [(a.kind, *a.parts) for a in found] == wanted


def test_grids_and_windows_are_known() -> None:
    """[height, width], where sides differ."""
    assert sketched(families.build("vit")).axes["pos_embed"][1].grid == (3, 4)
    table = "blocks.0.attn.relative_position_bias_table"
    assert sketched(families.build("beit")).axes[table][0].grid == (3, 4)


def test_gated_units_are_two() -> None:
    """The packed first layer of a SwiGLU."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, embed_dim=32, depth=1, num_heads=2, mlp_layer=timm.layers.SwiGLUPacked)  # fmt: skip
    assert sketched(model).axes["blocks.0.mlp.fc1.bias"] == (Axis(OUT, (2, 64)),)


@pytest.mark.parametrize(
    ("name", "block", "wanted"),
    [
        ("vit", "blocks.1", {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}),
        ("deit3", "blocks.1", {"ls1.gamma", "ls2.gamma"}),
        ("beit", "blocks.1", {"gamma_1", "gamma_2"}),
        ("swinv2", "layers.0.blocks.1", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}),
        ("swin", "layers.0.blocks.1", {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}),
        ("convnext", "stages.2.blocks.1", {"gamma"}),
        ("resnet", "layer1.1", {"bn2.weight", "bn2.bias"}),
        ("efficientnet", "blocks.2.1", {"bn3.weight", "bn3.bias"}),
    ],
)
def test_what_makes_a_block_silent(name: str, block: str, wanted: set[str]) -> None:
    """The last scales or projections alone, whatever the weights are."""
    assert set(silent(families.build(name), [block])[block]) == {f"{block}.{n}" for n in wanted}


def test_blocks_that_can_not_be_silenced_are_missing() -> None:
    """One that changes shapes, and one whose shortcut has a norm."""
    assert silent(families.build("resnet"), ["layer2.0"]) == {}
    assert silent(families.build("repvgg"), ["stages.1.1"]) == {}

"""anatomy.py: finding the sites of a backbone."""

import pytest
import timm
import torch
from torch import nn

from tests import families
from vtzoo.anatomy import Site, is_norm, survey
from vtzoo.classifier import head_names
from vtzoo.errors import UsageError
from vtzoo.probing import input_size, probe


def test_sites_of_a_transformer() -> None:
    """A ViT's linears, their shapes, its blocks, prefix and stem."""
    anatomy = survey(families.build("vit"))
    qkv = next(s for s in anatomy.linears if s.name == "blocks.1.attn.qkv")
    assert (qkv.shape, qkv.bias, qkv.called, qkv.facts) == ((96, 32), True, True, {"fused": 3})
    assert [b.name for b in anatomy.blocks] == ["blocks.0", "blocks.1"]
    assert anatomy.blocks[0].shape == (13, 32)
    assert (anatomy.prefix, anatomy.stem) == (1, "patch_embed.proj")
    assert not any(s.name.startswith("head") for s in anatomy.linears)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("test_vit_relpos", "rel_pos.mlp"), ("swinv2_cr_tiny_ns_224", "meta_mlp"), ("swinv2_tiny_window8_256", "cpb_mlp")],
)
def test_networks_of_relative_positions_are_no_mlps_of_the_blocks(name: str, inside: str) -> None:
    """Their layers have a role of their own; auto and mlp don't mean them, blocks and their names do."""
    anatomy = survey(
        timm.create_model(name, depth=2) if "vit" in name else timm.create_model(name, depths=(1, 1, 1, 1))
    )
    layers = [s.name for s in anatomy.linears if inside in s.name]
    assert len(layers) >= 4
    for target in ("auto", "mlp"):
        assert not {s.name for s in anatomy.select([target])} & set(layers), target
    assert set(layers) < {s.name for s in anatomy.select(["blocks"])}
    assert [s.name for s in anatomy.select(["position"])] == layers
    assert [s.name for s in anatomy.select([layers[0]])] == layers[:1]


def test_read_sites_are_told_from_called_ones() -> None:
    """BEiT's qkv is read, its proj is called."""
    called = {s.name: s.called for s in survey(families.build("beit")).linears}
    assert not called["blocks.0.attn.qkv"]
    assert called["blocks.0.attn.proj"]


def test_sites_of_a_convolutional_network() -> None:
    """Convolutions carry groups, stride and padding; weight-standardised ones say so."""
    anatomy = survey(families.build("resnet"))
    conv = next(s for s in anatomy.convs if s.name == "layer3.0.conv2")
    assert conv.facts["stride"] == [2, 2]
    assert conv.facts["groups"] == 1
    assert "standardised" not in conv.facts
    assert all(s.facts["standardised"] == "gain" for s in survey(families.build("nfnet")).convs if "attn" not in s.name)
    assert "bare" in {s.facts.get("standardised") for s in survey(families.build("hybrid")).convs}


@pytest.mark.parametrize("family", families.names())
def test_blocks_are_found_in_order(family: str) -> None:
    """Every family has numbered blocks, none inside another, in the order in which they run."""
    model = families.build(family)
    blocks = [b.name for b in survey(model).blocks]
    assert len(blocks) >= 2
    assert not any(a != b and a.startswith(b + ".") for a in blocks for b in blocks)
    order, handles = [], []
    for name in blocks:
        handles.append(model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name)))
    probe(model)
    assert order == blocks


@pytest.mark.parametrize(
    ("family", "target", "count"),
    [
        ("vit", "qkv", 2),
        ("vit", "attention", 4),
        ("vit", "mlp", 4),
        ("vit", "fc1", 2),
        ("vit", "linear", 8),
        ("vit", "conv", 1),
        ("vit", "blocks.1.*", 4),
        ("vit", "auto", 8),
        ("swinv2", "auto", 12),
        ("swinv2", ["cpb_mlp*", "*cpb_mlp*"][1], 6),
        ("swin", "downsample", 1),
        ("convnext", "depthwise", 5),
        ("resnet", "pointwise", 6),
    ],
)
def test_targets_choose_sites(family: str, target: str, count: int) -> None:
    """A role, the last part of a name, or a glob over full names."""
    assert len(survey(families.build(family)).select([target])) == count


def test_unknown_target_is_refused_with_a_suggestion() -> None:
    """A target that names nothing is a usage error that suggests the nearest word."""
    with pytest.raises(UsageError, match="kqv") as refusal:
        survey(families.build("vit")).select(["kqv"])
    assert "qkv" in refusal.value.hint


def test_targets_together_keep_the_order_of_the_net() -> None:
    """Several targets give each site once, in the net's order."""
    names = [s.name for s in survey(families.build("vit")).select(["mlp", "fc1", "qkv"])]
    assert names == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "mlp.fc1", "mlp.fc2")]


def test_auto_works_without_numbered_blocks() -> None:
    """A DenseNet's blocks are not numbered: auto is every dense convolution past the stem."""
    small = {"growth_rate": 4, "block_config": (1, 1, 1, 1)}
    anatomy = survey(timm.create_model("densenet121", num_classes=2, **small))
    names = {s.name for s in anatomy.select(["auto"])}
    assert not anatomy.blocks
    assert names
    assert anatomy.stem not in names


def test_survey_leaves_the_model_alone() -> None:
    """Hooks are gone, modes are as they were, and no gradient is kept."""
    model = families.build("resnet").train()
    model.layer1.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    survey(model)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())


def test_head_is_what_the_classifier_says() -> None:
    """The head's names; both of a distilled DeiT's; none for a net that has no classifier."""
    assert head_names(families.build("vit")) == ("head",)
    assert head_names(families.build("deit-dist")) == ("head", "head_dist")
    assert head_names(families.build("resnet")) == ("fc",)
    assert head_names(nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("family", families.names())
def test_probe_size_fits(family: str) -> None:
    """The size for a probe is one that the model takes: its own where it is fixed, a small one elsewhere."""
    model = families.build(family)
    channels, height, width = input_size(model)
    assert channels == 3
    if families.FAMILIES[family].larger:
        assert (height, width) == families.FAMILIES[family].size
    else:
        assert (height, width) == (96, 96)


def test_what_counts_as_a_norm() -> None:
    """Affine normalisations of one dimension do; a linear, and a norm without weight, don't."""
    assert is_norm(nn.LayerNorm(3))
    assert is_norm(nn.BatchNorm2d(3))
    assert is_norm(nn.RMSNorm(3))
    assert not is_norm(nn.LayerNorm(3, elementwise_affine=False))
    assert not is_norm(nn.Linear(3, 1))


def test_site_survives_json() -> None:
    """A site comes back equal from its JSON, which leaves out defaults."""
    for site in survey(families.build("mobilenetv4")).convs:
        assert Site.of(site.json()) == site
    assert Site(name="a", kind="linear", shape=(2, 3)).json() == {"name": "a", "kind": "linear", "shape": [2, 3]}


def test_keys_of_the_root_have_no_dot() -> None:
    """A parameter of the root is named by itself."""
    assert Site(name="", kind="params").key("pos_embed") == "pos_embed"
    assert Site(name="a.b", kind="params").key("w") == "a.b.w"


def test_an_attention_of_channels_is_no_position() -> None:
    """What a ResNet's global context computes by an MLP inside `attn` is a layer of the block like others."""
    anatomy = survey(timm.create_model("gcresnext26ts"), (3, 64, 64))
    inside = {s.name for s in anatomy.convs if ".attn." in s.name}
    assert inside
    assert inside <= {s.name for s in anatomy.select(["blocks"])}
    assert not any("position" in anatomy.roles(s) for s in anatomy.convs)


@pytest.mark.parametrize("name", ["bat_resnext26ts", "csatv2"])
def test_networks_that_take_no_small_image(name: str) -> None:
    """They are shown one of their own size, with as many channels as they take."""
    anatomy = survey(timm.create_model(name))
    assert anatomy.blocks

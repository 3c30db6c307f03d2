"""open_clip's configs as arguments of `clip`: what is kept, what is refused and why."""

from typing import Any

import pytest

from vtzoo.clip_config import image_size, read
from vtzoo.errors import UsageError

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VIT = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}


def _config(vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {**TEXT, **(text or {})}, **more}


def test_a_transformer_of_open_clip_becomes_its_twin() -> None:
    """Sizes of both towers are said in full; of the rest only what is not open_clip's default."""
    assert read(_config(VIT)) == {
        "embed_dim": 512,
        "trunk": "vit_base_patch16_clip_224",
        "trunk_args": {"img_size": 224, "patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12},
        "proj": "linear",
        "text": TEXT,
        "tokenizer": "",
        "tokenizer_args": {},
        "bias": False,
    }


@pytest.mark.parametrize(
    ("vision", "more", "trunk", "args"),
    [
        ({}, {"quick_gelu": True}, "vit_base_patch16_clip_224", {"act_layer": "quick_gelu"}),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, "vit_base_patch16_clip_224", {"act_layer": "gelu_tanh"}),
        ({"norm_kwargs": {"eps": 1e-6}}, {}, "vit_base_patch16_224", {"pre_norm": True}),
        ({"norm_kwargs": {"eps": 1e-6}, "no_ln_pre": True}, {}, "vit_base_patch16_224", {}),
        ({"no_ln_pre": True}, {}, "vit_base_patch16_clip_224", {"pre_norm": False}),
        ({"pool_type": "avg"}, {}, "vit_base_patch16_clip_224", {"global_pool": "avg", "fc_norm": False}),
        (
            {"pool_type": "avg", "final_ln_after_pool": True},
            {},
            "vit_base_patch16_clip_224",
            {"global_pool": "avg", "fc_norm": True},
        ),
        ({"ls_init_value": 0.1, "mlp_ratio": 3.5}, {}, "vit_base_patch16_clip_224", {"init_values": 0.1, "mlp_ratio": 3.5}),
        ({"image_size": [224, 448]}, {}, "vit_base_patch16_clip_224", {"img_size": [224, 448]}),
    ],
)  # fmt: skip
def test_what_a_transformer_can_be(
    vision: dict[str, Any], more: dict[str, Any], trunk: str, args: dict[str, Any]
) -> None:
    """Activation, norms, pooling and layer scale as timm's network says them."""
    usual = read(_config(VIT))["trunk_args"]
    found = read(_config({**VIT, **vision}, **more))
    assert (found["trunk"], found["trunk_args"]) == (trunk, {**usual, **args})


@pytest.mark.parametrize(
    ("vision", "trunk", "args", "proj"),
    [
        ({"layers": [3, 4, 6, 3], "width": 64, "patch_size": None}, "resnet50_clip", {"img_size": 224}, "linear-bias"),
        ({"layers": [4, 6, 10, 6], "width": 80}, "resnet50x4_clip", {"img_size": 224}, "linear-bias"),
        ({"layers": [4, 6, 10, 6], "width": 16}, "resnet50x4_clip", {"img_size": 224, "width_factor": 0.25}, "linear-bias"),
        ({"timm_model_name": "convnext_base.fb_in22k", "timm_pool": ""}, "convnext_base", {}, "linear"),
        ({"timm_model_name": "convnext_base", "timm_pool": "", "timm_proj_bias": True}, "convnext_base", {}, "linear-bias"),
        ({"timm_model_name": "a", "timm_proj": "mlp"}, "a", {"global_pool": "avg"}, "mlp"),
        ({"timm_model_name": "a", "timm_proj": "mlp", "timm_proj_bias": True}, "a", {"global_pool": "avg"}, "mlp-bias"),
        ({"timm_model_name": "a", "timm_pool": "map", "timm_proj": "none"}, "a", {"global_pool": "map"}, "none"),
        ({"timm_model_name": "a", "timm_pool": "token", "timm_proj": None}, "a", {"global_pool": "token"}, "linear-bias"),
        ({"timm_model_name": "a", "timm_pool": "token", "timm_proj": ""}, "a", {"global_pool": "token"}, "linear-bias"),
    ],
)  # fmt: skip
def test_other_image_towers(vision: dict[str, Any], trunk: str, args: dict[str, Any], proj: str) -> None:
    """A ModifiedResNet's attention pool and a classifier that open_clip takes for it give a projection with a bias."""
    found = read(_config({"image_size": 224, **vision}))
    assert (found["trunk"], found["trunk_args"], found["proj"]) == (trunk, args, proj)


def test_a_text_tower_as_siglip_has_it() -> None:
    """Activation, norms, tokenizer and what goes to it."""
    text = {
        "hf_tokenizer_name": "org/name", "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}, "width": 768, "tokenizer_mode": "clips",
    }  # fmt: skip
    found = read(_config(VIT, text, init_logit_bias=-10))
    said = {
        **TEXT,
        "width": 768,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "act": "gelu_tanh",
        "eps": 1e-6,
    }
    assert found["text"] == said
    assert (found["tokenizer"], found["bias"]) == ("org/name", True)
    assert found["tokenizer_args"] == {"clean": "canonicalize", "tokenizer_mode": "clips"}


@pytest.mark.parametrize(
    ("vision", "text", "more", "why"),
    [
        ({}, {}, {"multimodal_cfg": {}}, "CoCa"),
        ({}, {"hf_model_name": "roberta-base"}, {}, "another library"),
        ({}, {"qk_norm": True}, {}, "text tower are of open_clip's own kind .qk_norm"),
        ({"block_type": "custom"}, {}, {}, "image tower are of open_clip's own kind .custom"),
        ({"attentional_pool": True}, {}, {}, "pools by attention"),
        ({"pool_type": "none"}, {}, {}, "no twin that pools by"),
        ({"norm_kwargs": {"eps": 1e-3}}, {}, {}, "norms of eps 0.001"),
        ({"norm_kwargs": {"bias": False}}, {}, {}, "norms of its image tower"),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, {"quick_gelu": True}, "activation of its image tower"),
        ({"layers": [1, 2, 3, 4]}, {}, {}, "no twin of a ResNet"),
        ({"layers": [3, 4, 6, 3], "head_width": 32}, {}, {}, "heads of 64, not of 32"),
        ({"width": 100}, {}, {}, "patches and heads"),
        ({"timm_model_name": "a", "timm_pool": "rot_attn"}, {}, {}, "rot_attn"),
        ({"timm_model_name": "a", "timm_pool": "", "timm_proj": "none"}, {}, {}, "gives no features"),
        ({"timm_model_name": "hf-hub:some/one"}, {}, {}, "no name of a timm network"),
        ({"timm_model_name": "local-dir:/tmp"}, {}, {}, "no name of a timm network"),
        ({}, {"pool_type": "mean"}, {}, "pools and projects"),
        ({}, {"heads": 7}, {}, "don't share"),
        ({"widht": 8}, {}, {}, "no knob 'widht'.*did you mean width"),
        ({}, {"layers": "many"}, {}, "text_cfg: layers"),
        ({"width": 1 << 21}, {}, {}, "vision_cfg: width"),
        ({}, {}, {"embed_dim": 0}, "embed_dim"),
    ],
)  # fmt: skip
def test_what_has_no_form_here_is_refused(
    vision: dict[str, Any], text: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    """The reason is told; a word that isn't known is never passed over."""
    with pytest.raises(UsageError, match=why):
        read({**_config({**VIT, **vision}, text), **more})


def test_the_size_of_images() -> None:
    """One number is both sides."""
    assert image_size(_config(VIT)) == (224, 224)
    assert image_size(_config({**VIT, "image_size": [128, 256]})) == (128, 256)

"""Dual encoders against open_clip itself: each kind of image and text tower with the same random weights, and every config that it knows.

`VTZOO_SHOW=1 pytest -m slow tests/parity/test_open_clip.py` prints which of them are built, and why the others are not.
"""

import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtzoo.backbone import build_card, build_sized, create
from vtzoo.bases import file_fingerprint
from vtzoo.clip_card import card_of_config
from vtzoo.clip_config import ARCH, read
from vtzoo.clip_names import converted
from vtzoo.errors import UsageError
from vtzoo.fingerprint import fingerprint
from vtzoo.identity import CARD, RESIZED
from vtzoo.tensors import write

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 2}
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
RESNET = {"layers": [3, 4, 6, 3], "width": 8, "image_size": 64, "patch_size": None}


def _timm(name: str, pixels: int, **more: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": pixels, **more}


KINDS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT},
    "vit, quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "vit as clipa": {
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "vit, more": {
        "vision_cfg": {
            **VIT, "pool_type": "avg", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 3.3, "ls_init_value": 0.5,
        },
        "text_cfg": {**TEXT, "ls_init_value": 0.5, "mlp_ratio": 2.5},
    },
    "vit, not square": {"vision_cfg": {**VIT, "image_size": [32, 48], "norm_kwargs": {"eps": 1e-6}, "no_ln_pre": True}},
    "resnet": {"vision_cfg": RESNET, "quick_gelu": True},
    "timm, linear": {"vision_cfg": _timm("test_vit", 160, timm_pool="", timm_proj="linear")},
    "timm, linear with a bias": {"vision_cfg": _timm("test_convnext", 64, timm_pool="", timm_proj_bias=True)},
    "timm, mlp": {"vision_cfg": _timm("test_resnet", 64, timm_proj="mlp")},
    "timm, mlp with a bias": {"vision_cfg": _timm("test_resnet", 64, timm_proj="mlp", timm_proj_bias=True)},
    "timm, made to average": {"vision_cfg": _timm("test_vit", 160, timm_proj="linear", timm_proj_bias=True)},
    "timm, its average": {"vision_cfg": _timm("test_vit", 160, timm_proj="")},
    "timm, its classifier": {"vision_cfg": _timm("test_efficientnet", 64, timm_proj="")},
    "siglip": {
        "embed_dim": 64,
        "vision_cfg": _timm("test_vit", 160, timm_pool="map", timm_proj="none"),
        "text_cfg": {**TEXT, **SIGLIP, "act_kwargs": {"approximate": "tanh"}},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "mobileclip": {
        "vision_cfg": _timm("fastvit_mci0", 64, timm_proj=None),
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "metaclip 2": {"vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 2}, "custom_text": True},
    "no text projection": {
        "embed_dim": 16,
        "vision_cfg": VIT,
        "text_cfg": {**TEXT, "proj_type": "none", "pool_type": "first", "no_causal_mask": True},
        "custom_text": True,
        "nonscalar_logit_scale": True,
    },
    "a class token of the text": {"vision_cfg": VIT, "text_cfg": {**TEXT, "embed_cls": True, "pad_id": 1}, "custom_text": True},
}  # fmt: skip


def _config(kind: str) -> dict[str, Any]:
    return {"embed_dim": 20, "text_cfg": TEXT, **KINDS[kind]}


def _theirs(config: dict[str, Any]) -> nn.Module:
    """open_clip's own model, every number of it moved away from where it starts."""
    own = {k: v for k, v in config.items() if k != "custom_text"}
    made = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**own).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return made


def _images(config: dict[str, Any]) -> Tensor:
    size = config["vision_cfg"]["image_size"]
    return torch.randn(2, 3, *(size if isinstance(size, list) else (size, size)))


def _ids() -> Tensor:
    """Three texts of different lengths, ended by the largest token, which stands for the end in each way to pool."""
    ids = torch.randint(3, 60, (3, 8))
    for row, end in zip(ids, (7, 4, 2), strict=True):
        row[end], row[end + 1 :] = 63, 1
    ids[torch.arange(3), torch.tensor([6, 3, 1])] = 2
    return ids


def _far(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_towers_give_what_open_clip_gives(kind: str) -> None:
    """Image and text features in float64; the parameters are as many as open_clip's, both towers."""
    config = _config(kind)
    theirs, x, ids = _theirs(config).double(), _images(config).double(), _ids()
    args = card_of_config(config, {}).model_args
    model: Any = create(ARCH, **args).double().eval()
    model.load_state_dict(dict(converted(theirs.state_dict(), args)))
    assert _far(model(x), theirs.encode_image(x, normalize=True)) < 1e-12
    assert _far(model.text(ids), theirs.encode_text(ids)) < 1e-12
    assert model.logit_scale == theirs.logit_scale.squeeze()
    assert (model.logit_bias is None) == (theirs.logit_bias is None)
    added = config["vision_cfg"]["width"] if config["vision_cfg"].get("no_ln_pre") else 0
    assert _count(model) == _count(theirs) + added


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip"])
@torch.no_grad()
def test_a_file_of_open_clip_is_a_backbone(kind: str, tmp_path: Path) -> None:
    """Built from the file as it is; fingerprint and lazy base are of our names, and the card says so ever after."""
    config = _config(kind)
    theirs, x, path = _theirs(config), _images(config), tmp_path / "open_clip_model.safetensors"
    write(path, theirs.state_dict(), {})
    card = card_of_config(config, {})
    model: Any = build_card(card, weights=path)
    assert _far(model(x), theirs.encode_image(x, normalize=True)) < 1e-5
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("clip_head.")}
    made = getattr(model, CARD)
    assert made.fingerprint == fingerprint(own) == file_fingerprint(path, card)
    assert not getattr(model, RESIZED)
    write(tmp_path / "ours.safetensors", own, {})
    assert file_fingerprint(tmp_path / "ours.safetensors", card) == made.fingerprint


@pytest.mark.parametrize("kind", ["vit", "vit as clipa", "resnet", "siglip", "timm, its classifier"])
@torch.no_grad()
def test_at_another_image_size(kind: str, tmp_path: Path) -> None:
    """Position tables are resized as they are loaded, a transformer's as open_clip does it; the text tower stays as it is."""
    config = _config(kind)
    path, pixels = tmp_path / "f.safetensors", 2 * config["vision_cfg"]["image_size"]
    theirs = _theirs(config)
    write(path, theirs.state_dict(), {})
    card, model = build_sized(card_of_config(config, {}), pixels, weights=path)
    assert card.preprocess.input_size == (3, pixels, pixels)
    assert torch.isfinite(model(torch.randn(1, 3, pixels, pixels))).all()
    resized = getattr(model, RESIZED)
    if kind not in ("vit", "vit as clipa"):
        assert resized == ({"pos_embed"} if kind == "siglip" else set())
        return
    assert resized == {"pos_embed"}
    larger = _theirs({**config, "vision_cfg": {**config["vision_cfg"], "image_size": pixels}})
    state = theirs.state_dict()
    open_clip.model.resize_pos_embed(state, larger)
    assert _far(model.pos_embed[0], state["visual.positional_embedding"]) < 1e-6


def _built(name: str) -> str:
    """Compare a config's network with open_clip's, both without memory; gives the reason where it is refused."""
    config = open_clip.get_model_config(name)
    try:
        args = read(config)
    except UsageError as error:
        return error.message.partition(": ")[2]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, mine = _meta(config), create(ARCH, **args)
    names = converted(theirs.state_dict(), args)
    assert {n: tuple(t.shape) for n, t in mine.state_dict().items()} == {n: names.shape(n) for n in names}
    added = config["vision_cfg"]["width"] if config["vision_cfg"].get("no_ln_pre") else 0  # a bias where timm has one
    assert _count(mine) == _count(theirs) + added
    return ""


def _meta(config: dict[str, Any]) -> nn.Module:
    own = {k: v for k, v in config.items() if k != "custom_text"}
    return (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**own)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-CLIPA", "convnext_base", "MobileCLIP2-S0", "PE-Core-T-16-384"])
def test_a_config_of_each_kind_is_built(name: str) -> None:
    """The same tensors under our names, and as many parameters."""
    assert not _built(name)


@pytest.mark.slow
def test_every_config_is_built_or_refused_with_a_reason() -> None:
    """What is refused has a text tower of another library, or a third tower."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in open_clip.list_models():
        reasons[_built(name).partition(" (")[0]].append(name)
    built, count = reasons.pop(""), len(open_clip.list_models())
    if os.environ.get("VTZOO_SHOW"):
        print(
            f"\n{len(built)} of {count} configs of open_clip {open_clip.__version__} are built with its own parameter count"
        )
        print("\n".join(f"{len(names)} refused, {why}: {', '.join(names)}" for why, names in reasons.items()))
    assert set(reasons) <= {
        "it is a CoCa, which writes captions with a third tower",
        "its text tower is a network of another library",
    }
    assert len(built) >= 131

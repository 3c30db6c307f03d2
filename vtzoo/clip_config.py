"""An open_clip model's config as the arguments of a dual encoder here: a timm trunk, a projection, a text tower.

open_clip (Ilharco et al. 2021, doi:10.5281/zenodo.5143773) 3.3.0, model.py and timm_model.py. Its own image towers have twins in timm, with
the same function and other names of tensors: its VisionTransformer is timm's `vit_*_clip_*`, its ModifiedResNet timm's `resnet*_clip`. What brings a
trunk's features to `embed_dim` is no part of the trunk: a classifier that open_clip takes for it becomes the projection `linear-bias`.

Departs from open_clip: dropout, of patches too, and stochastic depth are left to whoever trains; what says where to find weights is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast

from pydantic import Field

from vtzoo.errors import UsageError
from vtzoo.knobs import decode
from vtzoo.refs import shown

ARCH = "clip"
"""The architecture's name, beside timm's own."""
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""The files of an open_clip folder, or of its repository on the hub."""
Count = Annotated[int, Field(gt=0, le=1 << 20)]
Ratio = Annotated[float, Field(gt=0, le=1 << 10)]
Kwargs = dict[str, Any] | None

TWIN, TWIN_EPS = "vit_base_patch16_clip_224", 1e-5
TWINS = {TWIN_EPS: TWIN, 1e-6: "vit_base_patch16_224"}
"""timm's networks that open_clip's VisionTransformer becomes with other sizes, by what their norms add to a variance."""
RESNETS: dict[tuple[int, ...], tuple[str, int]] = {
    (3, 4, 6, 3): ("resnet50_clip", 64),
    (3, 4, 23, 3): ("resnet101_clip", 64),
    (4, 6, 10, 6): ("resnet50x4_clip", 80),
    (6, 8, 18, 8): ("resnet50x16_clip", 96),
    (3, 15, 36, 10): ("resnet50x64_clip", 128),
}
"""timm's twin of a ModifiedResNet, and its width, by blocks per stage."""
ELASTIC = frozenset(name for name, _ in RESNETS.values())
"""Trunks that fit their position table to each image by themselves, and are built for one size all the same."""
_TOKENIZERS = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_TOKENIZER_ARGS: Mapping[str, Any] = {
    "clean": ("whitespace", "lower", "canonicalize"), "strip_sep_token": (False, True), "tokenizer_mode": ("", "clips"),
}  # fmt: skip
"""What a tokenizer may be told, and what of it: anything else could name a file that is read, or code of the hub that is run."""
_STEM_WIDTH = 64  # that timm's width_factor multiplies
_HEAD_WIDTH = 64  # of timm's attention pool
_ARCH = re.compile(r"[a-z0-9_]+")
_ELSE = "choose another model: vtzoo ls backbones, or python -c 'import open_clip; print(open_clip.list_models())'"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """What both towers say of a custom kind of block."""

    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    act_kwargs: Kwargs = None
    norm_kwargs: Kwargs = None
    output_tokens: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vision(_Blocks):
    """open_clip's CLIPVisionCfg."""

    layers: tuple[Count, ...] = (12,)
    width: Count = 768
    head_width: Count = 64
    mlp_ratio: Ratio = 4.0
    patch_size: tuple[Count, ...] | None = (16,)
    image_size: tuple[Count, ...] = (224,)
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text(_Blocks):
    """open_clip's CLIPTextCfg."""

    context_length: Count = 77
    vocab_size: Count = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Kwargs = None
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    mlp_ratio: Ratio = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """What open_clip's CLIP and CustomTextCLIP are made of."""

    embed_dim: Count
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    custom_text: bool = False
    multimodal_cfg: Kwargs = None
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False


_TEXT_SIZES = ("context_length", "vocab_size", "width", "heads", "layers")
_TEXT_MORE = ("mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_bias", "proj_type")  # fmt: skip


def read(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the architecture `clip` that make an open_clip model's network.

    Args:
        model_cfg: as `open_clip.get_model_config` or an open_clip_config.json has it.

    Returns:
        Plain JSON: trunk, trunk_args, embed_dim, proj, text, tokenizer, tokenizer_args, bias.

    Raises:
        UsageError: it says something unknown, or its network has no form here; the reason is told.
    """
    model = cast("_Model", decode(_Model, dict(model_cfg), "the model's config"))
    if model.multimodal_cfg is not None:
        raise _refused("it is a CoCa, which writes captions with a third tower")
    vision = cast("_Vision", decode(_Vision, model.vision_cfg, "vision_cfg"))
    text = cast("_Text", decode(_Text, model.text_cfg, "text_cfg"))
    quick, dim = model.quick_gelu, model.embed_dim
    args = {"embed_dim": dim, **_image(vision, quick=quick), "text": _text(text, quick=quick)}
    args |= {"tokenizer": text.hf_tokenizer_name or "", "bias": model.init_logit_bias is not None}
    mode = {"tokenizer_mode": text.tokenizer_mode} if text.hf_tokenizer_name and text.tokenizer_mode else {}
    said = {**mode, **(text.tokenizer_kwargs or {})}
    check_tokenizer(text.hf_tokenizer_name or "", said)
    return args | {"tokenizer_args": said}


def check_tokenizer(name: str, args: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that is none of the hub's by name, or is told what no open_clip model's is.

    Args:
        name: on the hub; "" for open_clip's own.
        args: of it.

    Raises:
        UsageError: says which.
    """
    if name and not _TOKENIZERS.fullmatch(name):
        raise _refused(f"{shown(name)} is no name of a tokenizer")
    for key, value in args.items():
        if key not in _TOKENIZER_ARGS or value not in _TOKENIZER_ARGS[key] or not (name or key == "clean"):
            raise _refused(f"its tokenizer takes {shown({key: value})}")


def image_size(model_cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the images that a model takes."""
    vision = cast("_Vision", decode(_Vision, dict(model_cfg.get("vision_cfg", {})), "vision_cfg"))
    return vision.image_size[0], vision.image_size[-1]


def _image(cfg: _Vision, *, quick: bool) -> dict[str, Any]:
    """trunk, trunk_args and proj."""
    if cfg.timm_model_name:
        return _timm(cfg)
    if len(cfg.layers) > 1:
        return _resnet(cfg)
    return _vit(cfg, quick=quick)


def _timm(cfg: _Vision) -> dict[str, Any]:
    """A timm network as it is; open_clip's adapter of it is timm_model.py."""
    trunk = str(cfg.timm_model_name).partition(".")[0]
    if not _ARCH.fullmatch(trunk):  # timm would fetch "hf-hub:…" and read "local-dir:…"
        raise _refused(f"{shown(cfg.timm_model_name)} is no name of a timm network")
    if cfg.timm_pool in ("abs_attn", "rot_attn"):
        raise _refused(f"its image tower pools by open_clip's '{cfg.timm_pool}' over a timm network")
    kind = cfg.timm_proj or ""
    if kind not in ("", "none", "linear", "mlp") or (kind in ("", "none") and not cfg.timm_pool):
        raise _refused(f"a projection {shown(cfg.timm_proj)} with the pooling {shown(cfg.timm_pool)} gives no features")
    bias = "-bias" if cfg.timm_proj_bias else ""
    proj = {"": "linear-bias", "none": "none"}.get(kind, kind + bias)
    return {"trunk": trunk, "trunk_args": {"global_pool": cfg.timm_pool} if cfg.timm_pool else {}, "proj": proj}


def _resnet(cfg: _Vision) -> dict[str, Any]:
    """open_clip's ModifiedResNet: its attention pool ends in the projection."""
    if cfg.layers not in RESNETS:
        raise _refused(f"timm has no twin of a ResNet with {shown(list(cfg.layers))} blocks")
    if cfg.head_width != _HEAD_WIDTH:
        raise _refused(f"timm's attention pool has heads of {_HEAD_WIDTH}, not of {cfg.head_width}")
    trunk, width = RESNETS[cfg.layers]
    args: dict[str, Any] = {"img_size": _plain(cfg.image_size)}
    if cfg.width != width:
        args["width_factor"] = cfg.width / _STEM_WIDTH
    return {"trunk": trunk, "trunk_args": args, "proj": "linear-bias"}


def _vit(cfg: _Vision, *, quick: bool) -> dict[str, Any]:
    """open_clip's VisionTransformer."""
    _refuse_custom(cfg, "image")
    if cfg.attentional_pool:
        raise _refused("its image tower pools by attention, as CoCa's does")
    if cfg.pool_type not in ("tok", "avg") or cfg.pos_embed_type not in ("learnable", "sin_cos_2d"):
        raise _refused(f"timm has no twin that pools by {shown([cfg.pool_type, cfg.pos_embed_type])}")
    if cfg.patch_size is None or cfg.width % cfg.head_width:
        raise _refused(f"no image tower has patches and heads of {shown([cfg.patch_size, cfg.width, cfg.head_width])}")
    eps = _eps(cfg.norm_kwargs, "image")
    if eps not in TWINS:
        raise _refused(f"timm has no twin with norms of eps {eps:g}")
    size = {"img_size": _plain(cfg.image_size), "patch_size": _plain(cfg.patch_size)}
    size |= {"embed_dim": cfg.width, "depth": cfg.layers[0], "num_heads": cfg.width // cfg.head_width}
    wanted = {"mlp_ratio": cfg.mlp_ratio, "init_values": cfg.ls_init_value, "act_layer": _act(cfg.act_kwargs, "image", quick=quick)}  # fmt: skip
    usual = {"mlp_ratio": 4.0, "init_values": None, "act_layer": "gelu"}
    more: dict[str, Any] = {k: v for k, v in wanted.items() if v != usual[k]}
    if cfg.no_ln_pre == (TWINS[eps] == TWIN):  # the one has that norm, the other hasn't
        more["pre_norm"] = not cfg.no_ln_pre
    if cfg.pool_type == "avg":
        more |= {"global_pool": "avg", "fc_norm": cfg.final_ln_after_pool}
    return {"trunk": TWINS[eps], "trunk_args": {**size, **more}, "proj": "linear"}


def _text(cfg: _Text, *, quick: bool) -> dict[str, Any]:
    """The sizes of open_clip's TextTransformer, and where it is other than its config's defaults."""
    if cfg.hf_model_name:
        raise _refused(f"its text tower is a network of another library ({shown(cfg.hf_model_name)})")
    _refuse_custom(cfg, "text")
    if cfg.pool_type not in ("first", "last", "argmax", "eos") or cfg.proj_type not in ("linear", "none"):
        raise _refused(f"a text tower that pools and projects by {shown([cfg.pool_type, cfg.proj_type])} is unknown")
    if cfg.width % cfg.heads:
        raise _refused(f"{cfg.heads} heads don't share a width of {cfg.width}")
    usual = {f.name: f.default for f in fields(_Text)}
    made = {k: getattr(cfg, k) for k in _TEXT_SIZES}
    made |= {k: getattr(cfg, k) for k in _TEXT_MORE if getattr(cfg, k) != usual[k]}
    act, eps = _act(cfg.act_kwargs, "text", quick=quick), _eps(cfg.norm_kwargs, "text")
    return made | ({"act": act} if act != "gelu" else {}) | ({"eps": eps} if eps != TWIN_EPS else {})


def _act(kwargs: Kwargs, tower: str, *, quick: bool) -> str:
    """timm's name of the activation."""
    said = dict(kwargs or {})
    how = said.pop("approximate", "none")
    if said or how not in ("none", "tanh") or (quick and kwargs):
        raise _refused(f"the activation of its {tower} tower takes {shown(kwargs)}")
    return "quick_gelu" if quick else "gelu_tanh" if how == "tanh" else "gelu"


def _eps(kwargs: Kwargs, tower: str) -> float:
    said = dict(kwargs or {})
    eps = said.pop("eps", TWIN_EPS)
    if said or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise _refused(f"the norms of its {tower} tower take {shown(kwargs)}")
    return float(eps)


def _refuse_custom(cfg: _Blocks, tower: str) -> None:
    odd = [f.name for f in fields(_Blocks) if isinstance(f.default, bool) and getattr(cfg, f.name)]
    odd = [name for name in odd if name != "output_tokens"] or ([str(cfg.block_type)] if cfg.block_type not in (None, "default") else [])  # fmt: skip
    if odd:
        raise _refused(f"the blocks of its {tower} tower are of open_clip's own kind ({', '.join(odd)})")


def _plain(sides: tuple[int, ...]) -> int | list[int]:
    return sides[0] if len(set(sides)) == 1 else list(sides)


def _refused(why: str) -> UsageError:
    return UsageError(f"this open_clip model has no form here: {why}", _ELSE)

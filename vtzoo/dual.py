"""Dual encoders: a timm network with a text tower beside it, registered in timm as the architecture `clip`.

    features = normalise(image_proj(trunk(x))),   logits = clip_head(features)

The image tower's tensors keep timm's own names at the root; beside them stand `image_proj`, `text`, `logit_scale`, `logit_bias` and the
classifier `clip_head`. Without a text tower (`text=False`) it is an image classifier over normalised features, which is what every
fold gives: import this module, and plain timm loads it.
"""

import copyreg
import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.mlp import Mlp
from timm.models import is_model, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.clip_config import ARCH, check_tokenizer
from vtzoo.errors import UsageError, did_you_mean
from vtzoo.lineage import WEIGHTS
from vtzoo.refs import shown
from vtzoo.spec import LOADING, SIDE_LIMIT
from vtzoo.speech import SCALES, TEXT, prompts, spelled
from vtzoo.tensors import TensorFile
from vtzoo.text_head import TextHead
from vtzoo.text_tower import build_text, tokenizer

PROJECTIONS = ("none", "linear", "linear-bias", "mlp", "mlp-bias")
BESIDE = (TEXT, *SCALES)
"""What is not of the image tower."""
OTHERS = ("license", "hf_hub_id", "url", "tag", "origin_url", "paper_ids", "paper_name", "notes")
"""What timm's config of an image tower says of weights that are not these."""
OWN = ("image_proj.", "clip_head.", *BESIDE)


class Dual:
    """What a timm network's class gets in addition.

    Attributes:
        text: the text tower, or None.
        image_proj: pooled features -> [n, embed_dim].
        clip_head: the classifier over normalised features: nothing, linear, or what the text tower makes of words.
    """

    embed_dim: int
    model_args: Mapping[str, Any]
    others = ("text", *SCALES)
    """Modules and parameters that are not the image tower's."""

    def forward(self, x: Any) -> Any:
        """[n, 3, h, w] -> logits, or normalised features where there are no classes."""
        own: Any = self
        return own.forward_head(own.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """What `forward_features` gives -> logits, or normalised features [n, embed_dim]; a classifier that is `placed` sees places."""
        own: Any = self
        if not pre_logits and getattr(own.clip_head, "placed", False):
            return own.clip_head(self.at_places(x))
        features = self._embedded(x)
        return features if pre_logits else own.clip_head(features)

    def at_places(self, x: Tensor) -> Tensor:
        """What `forward_features` gives, [n, tokens, c] or maps -> the normalised embedding of each place, [n, places, embed_dim].

        A place's is what the network makes of an image that looks like it everywhere.
        """
        own: Any = self
        if x.ndim == 3:
            before = int(getattr(own, "num_prefix_tokens", 0))
            each = x[:, before:]
            alone = each.flatten(0, 1)[:, None].expand(-1, before + 1, -1)
        elif getattr(own, "output_fmt", "NCHW") == "NHWC":
            each = x.flatten(1, 2)
            alone = each.flatten(0, 1)[:, None, None]
        else:
            each = x.flatten(2).mT
            alone = each.flatten(0, 1)[..., None, None]
        return self._embedded(alone).unflatten(0, (-1, each.shape[1]))

    @property
    def places(self) -> bool:
        """Whether `at_places` means something: a trunk that pools by attention weighs places against each other."""
        own: Any = self
        return not any("AttentionPool" in type(m).__name__ for m in own.modules())

    def _embedded(self, x: Tensor) -> Tensor:
        """What `forward_features` gives -> normalised features."""
        own: Any = self
        pooled = super().forward_head(x)  # type: ignore[misc] - the timm network's own, without a classifier
        return F.normalize(own.image_proj(pooled), dim=-1)

    def get_classifier(self) -> nn.Module:
        """`clip_head`."""
        own: Any = self
        return own.clip_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh linear classifier; none for 0."""
        if global_pool is not None:
            super().reset_classifier(0, global_pool=global_pool)  # type: ignore[misc] - the timm network's own
        own: Any = self
        like = next(own.parameters())
        own.num_classes = num_classes
        made = nn.Linear(own.embed_dim, num_classes) if num_classes else nn.Identity()
        own.clip_head = made.to(like.device, like.dtype)

    def speak(self, words: Sequence[str], templates: Sequence[str] = ()) -> nn.Module:
        """Classify by class names from now on; see `vtzoo.text_head`.

        Raises:
            UsageError: there is no text tower, or the words or templates are no good.
        """
        own: Any = self
        if own.text is None:
            raise UsageError("this network has no text tower", "build the dual encoder that it was made of")
        chosen = spelled(templates)
        ids = prompts(own.tokenize, words, chosen, own.text.context_length)
        own.num_classes = len(words)
        own.clip_head = TextHead(self, words, chosen, ids.to(own.logit_scale.device))
        return own

    @property
    def tokenize(self) -> Any:
        """Its tokenizer; see `vtzoo.text_tower`."""
        return _tokenizer(json.dumps(self.model_args, sort_keys=True))


@cache
def _tokenizer(model_args: str) -> Any:
    return tokenizer(json.loads(model_args))


class _Made(type):
    """The type of the classes made here, so that they can be pickled."""


copyreg.pickle(_Made, lambda made: (dual_class, (made.__mro__[2],)))


@cache
def dual_class(base: type) -> type:
    """A timm network's class with what `Dual` adds."""
    return _Made(f"Dual{base.__name__}", (Dual, base), {"__module__": __name__})


@register_model
def clip(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Mapping[str, Any] | None = None, *, trunk: str,
    embed_dim: int, trunk_args: Mapping[str, Any] | None = None, proj: str = "linear", text: Mapping[str, Any] | bool = False,
    tokenizer: str = "", tokenizer_args: Mapping[str, Any] | None = None, bias: bool = False, num_classes: int | None = None, **more: Any,
) -> nn.Module:  # fmt: skip
    """A dual encoder, or its image tower.

    Args:
        pretrained: load the state dict of the overlay, or the file of the config.
        pretrained_cfg: timm's.
        pretrained_cfg_overlay: timm's.
        trunk: timm's architecture of the image tower.
        embed_dim: width of what both towers give.
        trunk_args: timm's arguments of it.
        proj: what brings its features to that width.
        text: of the text tower, see `vtzoo.text_tower.build_text`; False for none.
        tokenizer: the hub's name of another tokenizer than open_clip's own.
        tokenizer_args: its arguments.
        bias: a bias on all logits (SigLIP).
        num_classes: of a linear classifier; the config's unless given.
        more: further arguments of the image tower.
    """
    _check(trunk, trunk_args or {})
    if not 0 < embed_dim <= SIDE_LIMIT:
        raise UsageError(f"no embeddings are {shown(embed_dim)} wide", "take the arguments of an open_clip model")
    check_tokenizer(tokenizer, tokenizer_args or {})
    more.pop("cache_dir", None)
    stored = _stored(pretrained_cfg, pretrained_cfg_overlay) if pretrained else None
    own = {n: t for n, t in (stored or {}).items() if n.startswith(OWN)}
    overlay = None if stored is None else {"source": "", "num_classes": 0, "custom_load": False}
    overlay = overlay and {**overlay, "state_dict": {n: t for n, t in stored.items() if n not in own}}  # type: ignore[union-attr]
    args: dict[str, Any] = {**(trunk_args or {}), **more, "num_classes": 0}
    model: Any = timm.create_model(trunk, pretrained=stored is not None, pretrained_cfg_overlay=overlay, **args)
    width = _width(model)
    model.__class__ = dual_class(type(model))
    model.embed_dim, model.text = embed_dim, None
    model.image_proj = _projection(proj, width, embed_dim)
    model.logit_bias = None
    if text:
        if not isinstance(text, Mapping):
            raise UsageError(f"no text tower is {shown(text)}", "give its sizes, as an open_clip config has them")
        model.text = build_text(text, embed_dim)
        model.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        model.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None
    model.model_args = {"text": text, "tokenizer": tokenizer, "tokenizer_args": tokenizer_args or {}}
    model.clip_head = nn.Identity()
    model.reset_classifier(int(_facts(pretrained_cfg).get("num_classes") or 0) if num_classes is None else num_classes)
    of_trunk = {k: v for k, v in model.pretrained_cfg.items() if k not in OTHERS}
    model.pretrained_cfg = {**of_trunk, "architecture": ARCH, "classifier": "clip_head"}
    if stored is not None:
        _load(model, own, speaks=bool(text))
    return model


def _check(trunk: str, trunk_args: Mapping[str, Any]) -> None:
    """Refuse an image tower by which a card from elsewhere could have timm fetch or load something.

    Raises:
        UsageError: it is none of timm's own, or its arguments say where to load it.
    """
    if not is_model(trunk) or trunk == ARCH:
        raise UsageError(f"timm has no architecture {shown(trunk)}", did_you_mean(trunk, timm.list_models()))
    if loading := sorted(LOADING & set(trunk_args)):
        raise UsageError(f"'{loading[0]}' says what to load, not what the network is", "leave it out of its trunk_args")


def _facts(config: Any) -> Mapping[str, Any]:
    """A timm config as a map."""
    return config if isinstance(config, Mapping) else config.to_dict() if config else {}


def _stored(config: Any, overlay: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
    """The state dict that timm was given."""
    if overlay and overlay.get("state_dict"):
        return overlay["state_dict"]
    facts = _facts(config)
    if facts.get("file"):
        path = Path(facts["file"])  # of "local-dir:…" the folder
        return dict(TensorFile(path / WEIGHTS if path.is_dir() else path))
    if facts.get("state_dict"):
        return facts["state_dict"]
    raise UsageError("a dual encoder has no weights of its own", "name one: clip:ViT-B-32.laion2b_s34b_b79k")


def _load(model: nn.Module, own: Mapping[str, Tensor], *, speaks: bool) -> None:
    """What is not the trunk's, all of it; a text tower that isn't wanted and a classifier of other classes stay out."""
    state = {n: t for n, t in model.state_dict().items() if n.startswith(OWN)}
    wanted = {n: t for n, t in own.items() if speaks or not n.startswith(BESIDE)}
    if any(n.startswith("clip_head.") and (n not in state or state[n].shape != t.shape) for n, t in wanted.items()):
        wanted = {n: t for n, t in wanted.items() if not n.startswith("clip_head.")}
    lacking = {n for n in state if n not in wanted and not n.startswith("clip_head.")}
    spare = set(wanted) - set(state)
    if lacking or spare:
        raise UsageError(
            f"the weights lack {sorted(lacking)[:2]} and bring {sorted(spare)[:2]}",
            "use the weights of this very model",
        )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise UsageError(
                f"{name} is {list(value.shape)}, {list(state[name].shape)} is wanted", "use this model's own weights"
            )
        state[name].copy_(value)


def _width(model: Any) -> int:
    """How many pooled features a timm network gives without a classifier."""
    return int(getattr(model, "head_hidden_size", 0) or model.num_features)


def _projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    if kind not in PROJECTIONS:
        raise UsageError(f"there is no projection '{kind}'", f"one of {', '.join(PROJECTIONS)}")
    bias = kind.endswith("-bias")
    if kind.startswith("linear"):
        return nn.Linear(width, embed_dim, bias=bias)
    return Mlp(width, 2 * embed_dim, embed_dim, bias=(True, bias)) if kind != "none" else nn.Identity()

"""An open_clip file's tensors under the names of the architecture `clip`: a timm trunk at the root, image_proj, text.*, logit_scale.

Read from open_clip 3.3.0 (transformer.py, modified_resnet.py, timm_model.py) and timm 1.0 (byobnet.py, vision_transformer.py, their
`_convert_openai_clip`). Each tensor is read when it is asked for; most are only renamed.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtzoo.errors import Corrupt, ShapeMismatch
from vtzoo.refs import shown
from vtzoo.tensors import Lazy, Piece, dtype_of, pieces_of, shape_of

Shape = tuple[int, ...]
Rule = tuple[re.Pattern[str], str]

_DROPPED = frozenset(("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size"))
"""What older files hold beside the weights: a mask that is made anew, and sizes that the config says."""
_TEXT_AT_ROOT = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text_projection")
_CONV = "patch_embed.proj"
_MODULE = r"(weight|bias)"
_BLOCK = r"transformer\.resblocks\.(\d+)\."


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), name) for pattern, name in pairs)


_EITHER = _rules((r"logit_(scale|bias)", r"logit_\1"))
_TEXT = _rules(
    (rf"text\.{_BLOCK}attn\.in_proj_{_MODULE}", r"text.transformer.resblocks.\1.attn.qkv.\2"),
    (rf"text\.{_BLOCK}attn\.out_proj\.{_MODULE}", r"text.transformer.resblocks.\1.attn.proj.\2"),
    (rf"(text\.{_BLOCK}(ln_[12]\.{_MODULE}|mlp\.c_(fc|proj)\.{_MODULE}|ls_[12]\.gamma))", r"\1"),
    (rf"(text\.(positional_embedding|cls_emb|token_embedding\.weight|ln_final\.{_MODULE}))", r"\1"),
    (r"(text\.text_projection(\.weight|\.bias)?)", r"\1"),
)
_VIT = _rules(
    (r"visual\.class_embedding", "cls_token"),
    (r"visual\.positional_embedding", "pos_embed"),
    (r"visual\.proj", "image_proj.weight"),
    (r"visual\.conv1\.weight", f"{_CONV}.weight"),
    (rf"visual\.ln_pre\.{_MODULE}", r"norm_pre.\1"),
    (rf"visual\.ln_post\.{_MODULE}", r"norm.\1"),
    (rf"visual\.{_BLOCK}ln_([12])\.{_MODULE}", r"blocks.\1.norm\2.\3"),
    (rf"visual\.{_BLOCK}attn\.in_proj_{_MODULE}", r"blocks.\1.attn.qkv.\2"),
    (rf"visual\.{_BLOCK}attn\.out_proj\.{_MODULE}", r"blocks.\1.attn.proj.\2"),
    (rf"visual\.{_BLOCK}mlp\.c_fc\.{_MODULE}", r"blocks.\1.mlp.fc1.\2"),
    (rf"visual\.{_BLOCK}mlp\.c_proj\.{_MODULE}", r"blocks.\1.mlp.fc2.\2"),
    (rf"visual\.{_BLOCK}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
)
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_STAGE = r"visual\.layer{stage}\.(\d+)\."
_RESNET = _rules(
    (r"visual\.conv([123])\.weight", r"stem.conv\1.conv.weight"),
    (rf"visual\.bn([123])\.{_NORM}", r"stem.conv\1.bn.\2"),
    *(
        (pattern.replace("{stage}", str(stage + 1)), name.replace("{stage}", str(stage)))
        for stage in range(4)
        for pattern, name in (
            *((f"{_STAGE}{kind}{i}\\.{_NORM}", rf"stages.{{stage}}.\1.conv{i}_{size}.{place}.\2") for i, size in ((1, "1x1"), (2, "kxk"), (3, "1x1")) for kind, place in (("conv", "conv"), ("bn", "bn"))),
            (_STAGE + r"downsample\.0\.weight", r"stages.{stage}.\1.shortcut.conv.conv.weight"),
            (rf"{_STAGE}downsample\.1\.{_NORM}", r"stages.{stage}.\1.shortcut.conv.bn.\2"),
        )
    ),
    (r"visual\.attnpool\.positional_embedding", "head.pos_embed"),
    (rf"visual\.attnpool\.([qkv])_proj\.{_MODULE}", r"head.\1.\2"),
    (rf"visual\.attnpool\.c_proj\.{_MODULE}", r"image_proj.\1"),
)  # fmt: skip
_TRUNK = _rules(
    (rf"visual\.head\.proj\.{_MODULE}", r"image_proj.\1"),
    (rf"visual\.head\.mlp\.(fc[12])\.{_MODULE}", r"image_proj.\1.\2"),
    (r"visual\.trunk\.(.+)", r"\1"),
)
_CLASSIFIERS = ("head.fc", "head", "fc", "classifier", "head.proj")
"""What timm's networks call the linear that open_clip takes for the projection where it adds none."""
_AGAIN = "give a file that open_clip wrote, for this very model"


@dataclass(frozen=True, slots=True)
class _Made:
    """Where a tensor comes from, and what is done to it on the way."""

    origin: str
    shape: Shape
    transposed: bool = False

    def of(self, stored: Mapping[str, Tensor]) -> Tensor:
        value = stored[self.origin]
        return value.T.contiguous() if self.transposed else value.reshape(self.shape)

    def pieces(self, stored: Mapping[str, Tensor]) -> Piece | None:
        """What reads a part of it, where its entries lie as they are stored."""
        return None if self.transposed else pieces_of(stored, self.origin)


def converted(stored: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """A dual encoder's tensors under our names; those of a file that has them already are given as they are.

    Args:
        stored: of an open_clip model, with the text tower at the root (CLIP) or below text. (CustomTextCLIP), or of `clip` itself.
        model_args: of the architecture `clip`; see `vtzoo.clip_config`.

    Raises:
        ShapeMismatch: there is a tensor that no such model has.
        Corrupt: two tensors go by one name.
    """
    if not any(name.startswith("visual.") for name in stored):
        return stored
    made: dict[str, _Made] = {}
    for name, one in _renamed(stored, model_args):
        if name in made:
            raise Corrupt(f"the file holds {name} twice, as {made[name].origin} and {one.origin}", _AGAIN)
        made[name] = one
    makers: dict[str, Callable[[], Tensor]] = {n: (lambda one=one: one.of(stored)) for n, one in made.items()}
    shapes = {n: one.shape for n, one in made.items()}
    dtypes = {n: dtype_of(stored, one.origin) for n, one in made.items()}
    pieces = {n: piece for n, one in made.items() if (piece := one.pieces(stored)) is not None}
    if "visual.class_embedding" in stored and "visual.ln_pre.weight" not in stored:
        width, dtype = shapes[f"{_CONV}.weight"][0], dtypes[f"{_CONV}.weight"]  # timm has a bias where no norm follows
        makers[f"{_CONV}.bias"] = lambda: torch.zeros(width, dtype=dtype)
        shapes[f"{_CONV}.bias"], dtypes[f"{_CONV}.bias"] = (width,), dtype
    return Lazy(makers, shapes, dtypes, pieces)


def _renamed(stored: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> Iterator[tuple[str, _Made]]:
    rules, renames = (*_EITHER, *_TEXT, *_image_rules(stored)), _classifier(stored, model_args)
    if (model_args.get("trunk_args") or {}).get("fc_norm"):
        renames |= {f"norm.{p}": f"fc_norm.{p}" for p in ("weight", "bias")}
    for origin in stored:
        if origin in _DROPPED:
            continue
        name = _name(f"text.{origin}" if origin.startswith(_TEXT_AT_ROOT) else origin, rules)
        if name is None:
            raise ShapeMismatch(f"the file holds {shown(origin)}, which no such model has", _AGAIN)
        yield renames.get(name, name), _changed(origin, name, shape_of(stored, origin))


def _image_rules(stored: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Those of the kind of image tower that a file holds."""
    if "visual.class_embedding" in stored:
        return _VIT
    return _RESNET if "visual.attnpool.c_proj.weight" in stored else _TRUNK


def _name(name: str, rules: Sequence[Rule]) -> str | None:
    found = ((pattern.fullmatch(name), new) for pattern, new in rules)
    return next((match.expand(new) for match, new in found if match), None)


def _changed(origin: str, name: str, shape: Shape) -> _Made:
    """What becomes of a tensor beside its name."""
    if origin == "visual.proj":
        return _Made(origin, shape[::-1], transposed=True)
    if origin == "visual.class_embedding":
        return _Made(origin, (1, 1, *shape))
    if origin == "visual.positional_embedding":
        return _Made(origin, (1, *shape))
    if name in ("logit_scale", "logit_bias") and shape == (1,):
        return _Made(origin, ())
    return _Made(origin, shape)


def _classifier(stored: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> dict[str, str]:
    """New names of a timm trunk's classifier, where it is the projection.

    Raises:
        ShapeMismatch: there is none.
    """
    trunk = any(n.startswith("visual.trunk.") for n in stored)
    if not trunk or model_args.get("proj") != "linear-bias" or "visual.head.proj.weight" in stored:
        return {}
    dim = model_args.get("embed_dim")
    for name in _CLASSIFIERS:
        weight = f"visual.trunk.{name}.weight"
        if weight in stored and len(shape := shape_of(stored, weight)) == 2 and shape[0] == dim:
            return {f"{name}.{p}": f"image_proj.{p}" for p in ("weight", "bias")}
    raise ShapeMismatch(f"the file holds no projection to {dim} features", _AGAIN)

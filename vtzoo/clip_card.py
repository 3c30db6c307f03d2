"""Cards of open_clip's models: of its own list by `clip:NAME[.TAG]`, and of a folder or repository that it wrote."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model

from vtzoo.clip_config import ARCH, image_size, read
from vtzoo.documents import document
from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean
from vtzoo.hub import SOURCE
from vtzoo.refs import shown
from vtzoo.spec import BackboneCard, Preprocess

PREFIX = f"{ARCH}:"
_CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}
"""timm's words for open_clip's ways to bring an image to its size."""
_USUAL = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""What open_clip's PreprocessCfg is where nothing is said: OpenAI's."""
_READY = f"RGB and one of the resize modes {', '.join(_CROPS)} are known"
_LACKING = "leave the tag out for random weights"


def clip_card(ref: str) -> BackboneCard:
    """The card of a model of open_clip's list; without a tag it has no weights.

    Whether its activations are QuickGELU is as the tag says: of `ViT-B-32` some weights were trained with them, some without.

    Args:
        ref: `clip:NAME[.TAG]`.

    Raises:
        NotFound: open_clip knows no such model, or no such weights of it.
        UsageError: open_clip is not installed, or the model has no form here.
    """
    library = open_clip()
    name, _, tag = ref.removeprefix(PREFIX).partition(".")
    name = name.replace("/", "-")
    config: dict[str, Any] | None = library.get_model_config(name) if name in library.list_models() else None
    if config is None:
        raise NotFound(f"open_clip has no model {shown(name)}", did_you_mean(name, library.list_models()))
    told: dict[str, Any] = library.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not told.get("hf_hub"):
        known = library.list_pretrained_tags_by_model(name)
        raise NotFound(f"open_clip has no weights {shown(tag)} of {name}", did_you_mean(tag, known) or _LACKING)
    config["quick_gelu"] = bool(config.get("quick_gelu") or told.get("quick_gelu"))
    repository = "/".join(told["hf_hub"].split("/")[:2]) if told else ""
    card = card_of_config(config, told)
    return replace(card, name=PREFIX + (f"{name}.{tag}" if tag else name), source=SOURCE + repository if told else "")


def card_of_config(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> BackboneCard:
    """A card from what open_clip says of a network and of the images that it takes.

    Raises:
        UsageError: the network has no form here.
        Corrupt: no image can be prepared so.
    """
    said = {**_USUAL, **{k: v for k, v in preprocess_cfg.items() if k in _USUAL and v is not None}}
    if (how := str(said["resize_mode"])) not in _CROPS or preprocess_cfg.get("mode", "RGB") != "RGB":
        raise UsageError(f"images are not made ready here by {shown(dict(preprocess_cfg))}", _READY)
    args = _settled(read(model_cfg), model_cfg["vision_cfg"])
    facts = {**said, "input_size": (3, *image_size(model_cfg)), "crop_pct": 1.0, "crop_mode": _CROPS[how]}
    return BackboneCard(
        name="", arch=ARCH, features=args["embed_dim"], preprocess=Preprocess.of(facts), model_args=args
    )


def _settled(args: dict[str, Any], vision_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a trunk's last norm where open_clip leaves it: it makes the network first, and then has it pool otherwise.

    timm puts that norm behind an average where it is asked for one from the start.
    """
    trunk, own = args["trunk"], args["trunk_args"]
    adds = vision_cfg.get("timm_proj", "linear") in ("linear", "mlp")
    if not (vision_cfg.get("timm_model_name") and adds and own and is_model(trunk)):
        return args
    try:
        with torch.device("meta"):
            first, then = (timm.create_model(trunk, num_classes=0, **more).state_dict() for more in ({}, own))
    except (AssertionError, TypeError, ValueError, RuntimeError):  # which building it will tell
        return args
    behind = "fc_norm.weight" in first
    return args if behind == ("fc_norm.weight" in then) else {**args, "trunk_args": {**own, "fc_norm": behind}}


def card_of_file(path: Path) -> BackboneCard:
    """A card from an open_clip_config.json.

    Raises:
        NotFound: no such file.
        Corrupt: it is none.
        UsageError: the network has no form here.
    """
    config = document(path)
    model, images = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not isinstance(images, dict):
        raise Corrupt(f"{path} is no open_clip config: it has no model_cfg", "let open_clip.push_to_hf_hub write it")
    return card_of_config(model, images)


def open_clip() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise UsageError(f"models of image and text need open_clip: {error}", "pip install 'vtzoo[clip]'") from error

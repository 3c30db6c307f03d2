"""Build a frozen timm backbone from the zoo's card of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.layers.drop import DropPath
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained
from torch import Tensor, nn

from vtzoo import hub
from vtzoo.bases import checked_path, file_fingerprint, tensors_of
from vtzoo.classifier import head_names
from vtzoo.clip_card import PREFIX, clip_card
from vtzoo.clip_config import ELASTIC
from vtzoo.dual import ARCH as DUAL
from vtzoo.errors import NotFound, UsageError, did_you_mean
from vtzoo.fingerprint import base_state, fingerprint_of
from vtzoo.identity import CARD, LOADED, RESIZED
from vtzoo.probing import probe
from vtzoo.spec import LOADING, BackboneCard, Preprocess, one_line
from vtzoo.speech import TEXT
from vtzoo.zoo import Zoo

if TYPE_CHECKING:
    from vtzoo.refs import Entry

PASSING = ("num_classes", "drop_path_rate")
"""Arguments that a card does not keep: they say nothing of the features."""


def build(name_or_ref: str, *, zoo: Zoo | None = None, pretrained: bool = True, **model_args: Any) -> nn.Module:
    """Build a backbone, frozen and in eval mode.

    Args:
        name_or_ref: an entry of the zoo or its catalogue, or any timm model name.
        zoo: where to look; by default the one `Zoo.find` gives.
        pretrained: load the entry's weights; otherwise random ones.
        model_args: passed to timm over the entry's own; `num_classes` is 0 unless given.

    Raises:
        NotFound: neither the zoo nor timm knows the name.
        Network: the weights must be fetched and can't be.
        WrongBackbone: the weights are no longer those that the entry was made with.
    """
    return build_card(card_of(name_or_ref, zoo), zoo=zoo, pretrained=pretrained, **model_args)


def card_of(name: str, zoo: Zoo | None = None) -> BackboneCard:
    """The card of an entry, or one made from timm's own config for a name that is in no zoo, or open_clip's for `clip:NAME`."""
    if name.startswith(PREFIX):
        return clip_card(name)
    try:
        entry: Entry = (zoo or Zoo.find()).resolve(name, "backbones")
    except NotFound:
        if not is_model(name):
            raise
        return timm_card(name)
    return BackboneCard.of(entry.name, entry.facts)


def timm_card(name: str) -> BackboneCard:
    """A card from timm's registry."""
    if not is_model(name):
        raise NotFound(f"timm has no architecture '{name}'", did_you_mean(name, timm.list_models()))
    arch, _, tag = name.partition(".")
    if tag and not is_model_pretrained(name):
        known = timm.list_pretrained(f"{arch}.*")
        raise NotFound(f"timm has no weights '{tag}' of {arch}", did_you_mean(name, known))
    config = get_pretrained_cfg(name)
    facts: dict[str, Any] = config.to_dict() if config else {}
    head = facts.get("classifier") or ()
    return BackboneCard(
        name=name,
        arch=name,
        source=f"hf-hub:{facts['hf_hub_id']}" if facts.get("hf_hub_id") else "",
        license=facts.get("license") or "",
        head=(head,) if isinstance(head, str) else tuple(head),
        preprocess=Preprocess.of(facts),
    )


def build_card(
    card: BackboneCard,
    *,
    zoo: Zoo | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build what a card describes; the card, with its fingerprint, stays on the model. A branch of the hub becomes the commit that was fetched.

    Args:
        card: of it.
        zoo: where its weights are looked up.
        pretrained: load them; otherwise random ones.
        weights: their file, where the card's source isn't to be asked.
        model_args: timm's, over the card's own; `num_classes` is 0 unless given.

    Raises:
        WrongBackbone: the weights are not those of the card's fingerprint.
    """
    overlay: dict[str, Any] = {}
    path = weights or (checked_path(card, zoo) if pretrained else None)
    if path is not None and weights is None:
        card = replace(card, source=hub.pinned(card.source, path))
    refuse_loading(card.model_args)
    args = {"num_classes": 0, **card.model_args, **model_args}
    if path is not None:
        found = tensors_of(path, card)
        stored = {n: found[n] for n in found if not (args.get("text") is False and n.startswith(TEXT))}
        overlay = {"state_dict": stored, "source": "", "num_classes": _classes(stored, card)}
    model = create(card.arch, pretrained=pretrained, pretrained_cfg_overlay=overlay or None, **args)
    head, loaded = _head(card, model, overlay.get("state_dict", {})), fingerprint_of(model)
    shown = replace(
        card, model_args={k: v for k, v in args.items() if k not in PASSING}, head=head, preprocess=_looking(card, args),
        fingerprint=loaded if path is None else card.fingerprint or file_fingerprint(path, replace(card, head=head)),  # a known one was checked
    )  # fmt: skip
    shapes = {n: tuple(t.shape) for n, t in overlay.get("state_dict", {}).items()}
    soften(model, shapes)
    resized = {n for n, t in base_state(model).items() if shapes.get(n, tuple(t.shape)) != tuple(t.shape)}
    model.__dict__.update({CARD: shown, LOADED: loaded, RESIZED: frozenset(resized)})
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # loaded; not to be carried along
    return model.requires_grad_(requires_grad=False).eval()


def _head(card: BackboneCard, model: nn.Module, stored: Iterable[str]) -> tuple[str, ...]:
    """The card's head, and what comes and goes with it in the model or stands beside it in the weights (a norm, say)."""
    own, beside = model.state_dict(), tuple(f"{h.rpartition('.')[0]}." for h in card.head if "." in h)
    more = [n for n in head_names(model) if n not in card.head and not any(h.startswith(f"{n}.") for h in card.head)]
    inside = (*card.head, *(f"{h}." for h in card.head))
    return (
        *card.head,
        *more,
        *(n for n in stored if n not in own and n.startswith(beside) and not n.startswith(inside)),
    )


def _classes(stored: Mapping[str, Tensor], card: BackboneCard) -> int:
    """How many classes the weights' own classifier has; timm loads it when the model has as many, and drops it otherwise."""
    inside = card.head or timm_card(card.arch).head  # modules, or their tensors
    names = {n.removesuffix(".weight") for n in inside}
    found = (stored[f"{n}.weight"] for n in sorted(names) if f"{n}.weight" in stored)
    return next((len(weight) for weight in found if weight.ndim > 1), 0)


def _looking(card: BackboneCard, args: Mapping[str, Any]) -> Preprocess:
    """The card's preprocessing at the size that timm's `img_size` makes the network for."""
    size = args.get("img_size")
    if size is None:
        return card.preprocess
    height, width = (size, size) if isinstance(size, int) else size
    return replace(card.preprocess, input_size=(card.preprocess.input_size[0], height, width))


def soften(model: nn.Module, loaded: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Start every classifier near zero, unless the weights (shapes by name) brought it along.

    timm draws an EfficientNet's from the range 1/sqrt(classes): first losses of 8 and more, which drive a delta far
    from the backbone before the head has learned anything.
    """
    for name in head_names(model):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear | nn.Conv2d) and (loaded or {}).get(f"{name}.weight") != tuple(
            module.weight.shape
        ):
            nn.init.trunc_normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def create(arch: str, **args: Any) -> nn.Module:
    """timm's `create_model` with refusals that a person can act on.

    Raises:
        NotFound: timm has no such architecture.
        UsageError: it doesn't take these arguments, or one of them would load a file (they may come from elsewhere).
    """
    if not is_model(arch):
        raise NotFound(f"timm has no architecture '{arch}'", did_you_mean(arch, timm.list_models()))
    refuse_loading({k: v for k, v in args.items() if k not in ("pretrained", "pretrained_cfg_overlay")})
    try:
        return timm.create_model(arch, **args)
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"{arch} does not take these arguments: {one_line(error)[:200]}", "see timm.create_model's arguments for it"
        ) from error


def refuse_loading(args: Mapping[str, Any]) -> None:
    """Refuse arguments by which an entry, a header or a config from elsewhere could have timm load a file, pickled even.

    Raises:
        UsageError: there is one.
    """
    if loading := sorted(LOADING & set(args)):
        raise UsageError(f"'{loading[0]}' says what to load, not what the network is", "leave it out of its model_args")


def sized(card: BackboneCard, pixels: int | None) -> tuple[BackboneCard, dict[str, Any]]:
    """The card at another input size, and the timm arguments that this needs."""
    if pixels is not None and pixels < 1:
        raise UsageError(f"there are no images of {pixels} pixels", "choose another --image-size")
    if pixels is None or tuple(card.preprocess.input_size[1:]) == (pixels, pixels):
        return card, {}
    resized = replace(
        card, preprocess=replace(card.preprocess, input_size=(card.preprocess.input_size[0], pixels, pixels))
    )
    return resized, {"img_size": pixels} if takes_size(card) else {}


def takes_size(card: BackboneCard) -> bool:
    """Whether a network is built for images of one size, which timm calls `img_size`."""
    network = card.model_args["trunk"] if card.arch == DUAL else card.arch
    config = get_pretrained_cfg(network)
    return bool(config and config.fixed_input_size and network not in ELASTIC)


def build_sized(
    card: BackboneCard, pixels: int | None, *, zoo: Zoo | None = None, pretrained: bool = True, **model_args: Any
) -> tuple[BackboneCard, nn.Module]:
    """The card at an input size (None: its own), and what it describes.

    Raises:
        UsageError: the network takes no images of that size.
        WrongBackbone: as `build_card`.
    """
    card, args = sized(card, pixels)
    return card, taking(card, pixels, lambda: build_card(card, zoo=zoo, pretrained=pretrained, **args, **model_args))


def set_depth(model: nn.Module, rate: float) -> None:
    """See to it that a network has the stochastic depth that it was built with, and with rate 0 none; some have it by themselves.

    Raises:
        UsageError: it has no place for any.
    """
    places = [m for m in model.modules() if isinstance(m, DropPath)]
    if rate and not any(m.drop_prob for m in places):
        raise UsageError(f"{type(model).__name__} has no stochastic depth to set", "use --set drop_path=0")
    for place in places:
        place.drop_prob = place.drop_prob if rate else 0.0


def taking(card: BackboneCard, pixels: int | None, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network, and where a size was asked for, run one image of it.

    Raises:
        UsageError: it takes no images of that size.
    """
    if pixels is None:
        return build()
    try:
        model = build()
        probe(model, card.preprocess.input_size)
    except (AssertionError, RuntimeError, ValueError) as error:  # all that timm and torch raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{card.name or card.arch} takes no images of {pixels} pixels: {why}", "choose another --image-size"
        ) from error
    return model


def config_json(
    model: nn.Module, card: BackboneCard, classes: tuple[str, ...], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What timm needs beside the weights to load a folder: architecture, arguments, labels, preprocessing."""
    own: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    keep = ("first_conv", "classifier", "pool_size", "license", "fixed_input_size")
    shape = card.preprocess
    config = {k: own[k] for k in keep if own.get(k) is not None}
    config |= {"input_size": list(shape.input_size), "mean": list(shape.mean), "std": list(shape.std)}
    config |= {"interpolation": shape.interpolation, "crop_pct": shape.crop_pct, "crop_mode": shape.crop_mode}
    config |= {"num_classes": len(classes)} | ({"license": card.license} if card.license else {})
    return {
        "architecture": card.arch.partition(".")[0],
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", 0),
        "model_args": {**card.model_args, **extra},
        "label_names": list(classes),
        "pretrained_cfg": config,
    }

"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors` of one delta, and back.

    base_model.model.<module>.lora_A.weight    [rank, in] or [rank, in, kh, kw]
    base_model.model.<module>.lora_B.weight    [out, rank] or [out, rank, 1, 1]
    base_model.model.<module>.lora_magnitude_vector    [out] or [1, out, 1, 1]
    base_model.model.<head>.weight, .bias      the head, whole, under modules_to_save

Written as PEFT 0.21 writes it. What PEFT has no place for (labels, preprocessing, fingerprint, knobs) stands in
`vtzoo.json` beside. Other types than LoRA: see `_forms`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtzoo.anatomy import Anatomy, Site
from vtzoo.delta import Delta, Part
from vtzoo.documents import document
from vtzoo.errors import Mismatch, NotFound, ShapeMismatch
from vtzoo.graft import stored
from vtzoo.interop import _lora
from vtzoo.interop._forms import FORMS, shared_of, whole
from vtzoo.interop._parts import Piece
from vtzoo.interop._places import check_place, layers, site_of
from vtzoo.interop._settings import DEFAULTS, FREE, METHODS, Settings, matches
from vtzoo.rebuilt import rebuild
from vtzoo.tensors import TensorFile, write

CONFIG, WEIGHTS, BESIDE = "adapter_config.json", "adapter_model.safetensors", "vtzoo.json"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
LORA = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
KEEPS_WEIGHTS = {True, False, "gaussian", "orthogonal", "true", "false"}
"""Initial values that leave the base as it is."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A PEFT folder in our terms; the head under its timm names."""

    pieces: list[Piece]
    head: Mapping[str, Tensor]
    peft_type: str


def pack(delta: Delta, anatomy: Anatomy, head: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files' contents.

    Raises:
        Mismatch: PEFT can't hold it, or would make another function of it, and why.
    """
    part, peft_type = _single(delta)
    hint = "keep it as a delta, or fold it into plain weights: vtzoo fold REF --out DIR"
    for site in part.sites:
        check_place(anatomy, site, peft_type, hint)
    config, given, extra = (_give_lora if peft_type == "LORA" else _give_form)(part, peft_type, delta.tensors, anatomy)
    every = [n for n, _ in anatomy.model.named_modules()]
    heads = [n for n in anatomy.head if any(t.startswith(f"{n}.") for t in head)]
    if odd := next((n for n in every for h in heads if n != h and n.endswith(h) and not n.startswith(f"{h}.")), ""):
        raise Mismatch(f"PEFT would take {odd} for the head too, whose name it ends with", hint)
    names = [s.name for s in part.sites]
    told: dict[str, Any] = {"target_modules": _targets(names, every), "modules_to_save": sorted(heads) or None}
    if "feedforward_modules" in config and isinstance(told["target_modules"], str):
        told["feedforward_modules"] = _either(config["feedforward_modules"])
    about = {"base_model_class": type(anatomy.model).__name__, "parent_library": type(anatomy.model).__module__}
    known = delta.backbone.source.partition(":")
    base = known[2].partition("@")[0] if known[0] == "hf-hub" else None
    made = {**DEFAULTS[peft_type], **config, **told, "auto_mapping": about, "base_model_name_or_path": base}
    tensors = {f"{PREFIX}{n}.{k}": t for n, own in given.items() for k, t in own.items()}
    tensors |= {f"base_model.{n}": t for n, t in extra.items()} | {PREFIX + n: t for n, t in head.items()}
    return {**made, "inference_mode": True, "peft_type": peft_type}, tensors


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], beside: Mapping[str, Any]) -> None:
    """Write the three files into an existing folder."""
    for name, content in ((CONFIG, config), (BESIDE, beside)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    write(folder / WEIGHTS, tensors, {"format": "pt"})


def load(folder: Path, anatomy: Anatomy, weights: Path | None = None) -> Read:
    """Read a folder for a backbone, its weights from another safetensors file where one is given.

    Raises:
        NotFound: no such folder or files.
        Corrupt: they are damaged.
        Mismatch: they change the base, had no effect, or are of a kind that isn't read here.
        ShapeMismatch: not this backbone's layers, or tensors missing or left over.
    """
    config, tensors = _json(folder / CONFIG), TensorFile(weights or weights_of(folder))
    peft_type = str(config.get("peft_type"))
    if peft_type not in DEFAULTS:
        raise Mismatch(f"PEFT's type {peft_type} is not read here", f"one of {', '.join(sorted(DEFAULTS))}")
    _check_config(config, peft_type)
    try:
        pieces, head = _pieces(tensors, Settings(config, peft_type), peft_type, anatomy)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError, re.error) as error:
        raise ShapeMismatch(
            f"{folder / WEIGHTS} is no complete {peft_type} of this config: {error}", "fetch it again"
        ) from error
    return Read(pieces=pieces, head=head, peft_type=peft_type)


def beside(folder: Path) -> dict[str, Any]:
    """What vtzoo wrote beside PEFT's files: the backbone, the task; nothing where another wrote them."""
    return _json(folder / BESIDE) if (folder / BESIDE).is_file() else {}


def _pieces(
    tensors: TensorFile, settings: Settings, peft_type: str, anatomy: Anatomy
) -> tuple[list[Piece], dict[str, Tensor]]:
    lora = peft_type == "LORA"
    found, head, extra = _split(tensors, LORA if lora else FORMS[peft_type].suffixes, anatomy, settings)
    hint = "train it on other layers: vtzoo train … --method lora[targets=…] acts where weights are read, too"
    for name in found:
        if peft_type != "LN_TUNING":
            check_place(anatomy, site_of(anatomy, name), peft_type, hint)
    if not head and any(n.endswith(m) for n in anatomy.head for m in settings["modules_to_save"] or []):
        raise ShapeMismatch(
            f"{tensors.path} lacks the head, which its config names in modules_to_save", "fetch it again"
        )
    _check_complete(settings, found, anatomy)
    take = _take_lora if lora else FORMS[peft_type].take
    return take(anatomy, settings, found, extra), head


def _single(delta: Delta) -> tuple[Part, str]:
    """The one part, and PEFT's word for its method."""
    hint = "fold it into plain weights: vtzoo fold REF --out DIR"
    if len(delta.parts) != 1:
        raise Mismatch(f"{delta.method} is a stack of {len(delta.parts)} parts, PEFT's file holds one", hint)
    part = delta.parts[0]
    if part.method == "fourierft":
        raise Mismatch("PEFT draws the places of FourierFT's coefficients itself, and they are not these", hint)
    if part.method not in METHODS:
        raise Mismatch(f"PEFT has no form of {part.method}", hint)
    if list(delta.overrides):
        raise Mismatch("the delta works at another input size, for which it carries resized tensors", hint)
    return part, METHODS[part.method]


Given = tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]


def _own(part: Part, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{site.key(part.graft)}."
    return {n[len(prefix) :]: tensors[n] for n in tensors if n.startswith(prefix)}


def _give_lora(part: Part, _type: str, tensors: Mapping[str, Tensor], anatomy: Anatomy) -> Given:
    pairs: dict[str, _lora.Pair] = {}
    given: dict[str, dict[str, Tensor]] = {}
    for site in part.sites:
        graft: Any = rebuild(part.module, site, part.config)
        weight = stored(anatomy.modules[site.name], "weight").detach().cpu()
        pair = pairs[site.name] = _lora.plain(site, graft, _own(part, site, tensors), weight)
        conv, kernel = site.kind == "conv", site.shape[1:]
        own = given[site.name] = {
            LORA[0]: pair.A.reshape(-1, *kernel),
            LORA[1]: pair.B.reshape(*pair.B.shape, *[1] * 2 * conv),
        }
        if pair.m is not None:
            own[LORA[2]] = pair.m.reshape((1, -1, 1, 1) if conv else (-1,))
    knobs, root = part.config, 0.5 if part.config.rs else 1.0
    usual = {"r": knobs.rank, "lora_alpha": knobs.alpha or knobs.rank}
    if all(p.rank != knobs.rank for p in pairs.values()):  # PiSSA's, or parts of a fused qkv
        usual = {"r": _lora.mode(p.rank for p in pairs.values())}
        usual["lora_alpha"] = _lora.mode(p.scale * p.rank**root for p in pairs.values())
    exact = {n: p.scale * p.rank**root for n, p in pairs.items()}
    ranks = {_pattern_key(n): p.rank for n, p in pairs.items() if p.rank != usual["r"]}
    alphas = {
        _pattern_key(n): whole(a) for n, a in exact.items() if not math.isclose(a, usual["lora_alpha"], rel_tol=1e-12)
    }
    config = {**usual, "lora_alpha": whole(usual["lora_alpha"]), "rank_pattern": ranks, "alpha_pattern": alphas}
    return {**config, "use_dora": knobs.dora, "use_rslora": knobs.rs, "lora_dropout": knobs.dropout}, given, {}


def _take_lora(
    anatomy: Anatomy, config: Settings, found: Mapping[str, Mapping[str, Tensor]], _extra: Mapping[str, Tensor]
) -> list[Piece]:
    rs, dora = bool(config["use_rslora"]), bool(config["use_dora"])
    pairs: dict[str, tuple[Site, _lora.Pair]] = {}
    for name, own in found.items():
        site, A, B, m = site_of(anatomy, name), own[LORA[0]], own[LORA[1]], own.get(LORA[2])
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        shapes = [(rank, *site.shape[1:]), (site.shape[0], rank)]
        for which, value, shape in zip("AB", (A, B), shapes, strict=True):
            if value.shape[: len(shape)] != torch.Size(shape):
                raise ShapeMismatch(
                    f"{name}.lora_{which} is {list(value.shape)} in the file, {list(shape)} by its config and this backbone",
                    "is it the backbone that the file was made for?",
                )
        if (m is not None) != dora:
            raise ShapeMismatch(f"{name}: use_dora={dora}, and the file {'lacks' if dora else 'has'} its magnitudes", "fetch it again")  # fmt: skip
        scale = alpha / (math.sqrt(rank) if rs else rank)
        length = m.flatten() if m is not None else None
        pairs[name] = site, _lora.Pair(A=A.flatten(1), B=B.flatten(1), scale=scale, m=length)
    knobs = {"rank": config["r"], "alpha": config["lora_alpha"], "rs": rs, "dropout": config["lora_dropout"]}
    return [_lora.piece(anatomy, pairs, **knobs)]


def _give_form(part: Part, peft_type: str, tensors: Mapping[str, Tensor], anatomy: Anatomy) -> Given:
    form = FORMS[peft_type]
    grafts = {s.name: _drawn(part, s) for s in part.sites}
    config = form.config(part, grafts)
    given = {s.name: form.give(s, grafts[s.name], _own(part, s, tensors), anatomy, config) for s in part.sites}
    return config, given, shared_of(part)


def _drawn(part: Part, site: Site) -> Any:
    """A graft with the constants that no file holds."""
    if part.method == "shira":
        return part.module.Graft(site, part.config)
    return rebuild(part.module, site, part.config)


def _split(
    tensors: TensorFile, suffixes: tuple[str, ...], anatomy: Anatomy, config: Settings
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by layer, the head's by timm name, and what belongs to all."""
    found: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    inside = tuple(f"{n}." for n in anatomy.head)
    for key in tensors:
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), "")
        if suffix:
            found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = tensors[key]
        elif key in ("base_model.vera_A", "base_model.vera_B"):
            extra[key.removeprefix("base_model.")] = tensors[key]
        elif inside and name.startswith(inside):
            head[name] = tensors[key]
        elif any(f".{m}." in f".{name}" for m in config["modules_to_save"] or []):
            raise Mismatch(f"{name} replaces a module that is not the head, which a delta of this kind does not hold", "train it without that in modules_to_save")  # fmt: skip
        else:
            raise ShapeMismatch(f"{tensors.path} holds {key}, for which there is no place here", "is it this backbone's, and of this config?")  # fmt: skip
    if not found:
        raise ShapeMismatch(f"{tensors.path} holds no adapter", "fetch it again")
    return found, head, extra


def _check_config(config: Mapping[str, Any], peft_type: str) -> None:
    """Refuse what changes the function in a way that isn't read here."""
    init = config.get("init_lora_weights", True)
    if peft_type == "LORA" and not isinstance(init, bool) and str(init).lower() not in KEEPS_WEIGHTS:
        raise Mismatch(
            f"init_lora_weights={init} changed the base's weights, which this backbone still has as they were",
            "convert it in PEFT first: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    for key, value in config.items():
        if key not in FREE and value and value != DEFAULTS[peft_type].get(key):
            raise Mismatch(f"{key}={value} is not read here", "train it without, or merge in PEFT and: vtzoo add delta")


def _check_complete(config: Settings, found: Mapping[str, Any], anatomy: Anatomy) -> None:
    """Every layer that the config names must have its tensors."""
    targets = config["target_modules"]
    if (
        not targets
        or targets == "all-linear"
        or any(config.values.get(k) is not None for k in ("layers_to_transform", "exclude_modules"))
    ):
        return
    lacking = [n for n in layers(anatomy) if n not in found and matches(targets, n)]
    if lacking:
        raise ShapeMismatch(f"the file lacks tensors of {lacking[0]}, which its config names", "fetch it again")


def _pattern_key(name: str) -> str:
    return "^" + re.escape(name)


def _targets(names: list[str], every: list[str]) -> list[str] | str:
    """Full names; as one expression where PEFT would take the end of another module's name for one of them."""
    chosen = set(names)
    clash = any(n.endswith(f".{t}") for t in chosen for n in every if n not in chosen)
    return _either(names) if clash else sorted(names)


def _either(names: Iterable[str]) -> str:
    return "|".join(re.escape(n) for n in sorted(names)) or "(?!)"


def weights_of(folder: Path) -> Path:
    """The file with the tensors; older ones are pickles.

    Raises:
        NotFound: there is none, or no config beside it.
    """
    if not (folder / CONFIG).is_file():
        raise NotFound(f"no file {folder / CONFIG}", "give a folder that PEFT's save_pretrained wrote")
    found = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if found is None:
        raise NotFound(f"{folder} has no {WEIGHTS}", "give a folder that PEFT's save_pretrained wrote")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir() or not path.is_file():
        raise NotFound(f"no file {path}", "give a folder that PEFT's save_pretrained wrote")
    return document(path)

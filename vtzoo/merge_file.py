"""A merge written down: our own YAML, and mergekit's for those of its methods that are the same here.

method: ties[density=0.2]         merge_method: ties
name: both                        base_model: ignored, since a delta names its own backbone
layers: blocks.0-5:0.3            models:
deltas:                             - model: fashion/lora
- fashion/lora                      parameters: {weight: 1.0, density: 0.2}
- ref: emoji/ssf                  - model: emoji/ssf
coef: 0.5                         parameters: {weight: 0.5, density: 0.2}
data: ./emoji                 parameters: {lambda: 1.0}
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vtzoo import knobs, yaml_file
from vtzoo.errors import UsageError, did_you_mean

MERGEKIT: dict[str, tuple[str, dict[str, str]]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task-arithmetic", {"lambda": "scale"}),
    "ties": ("ties[scope=tensor]", {"lambda": "scale", "density": "density"}),
    "model_stock": ("model-stock", {}),
    "sce": ("sce", {"select_topk": "density"}),
}
"""Its methods that are the same here: our spec, and what its parameters are called in it."""
NORMALIZED = ("linear", "ties")
IGNORED = ("dtype", "out_dtype", "base_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a file asks for, as the arguments of a merge."""

    refs: tuple[str, ...]
    method: str
    coef: tuple[float, ...] | None = None
    layers: str = ""
    data: tuple[str, ...] = ()
    name: str = ""
    search: str = ""
    by: str = ""
    refit_heads: str = ""
    keep: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    method: str
    deltas: tuple[Any, ...]
    name: str = ""
    layers: str = ""
    search: str = ""
    by: str = ""
    refit_heads: str = ""
    keep: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    ref: str
    coef: float = 1.0
    data: str = ""


def read(text: str, where: str) -> Asked:
    """Read a file's text; `where` names it in messages.

    Raises:
        UsageError: it is no YAML, has unknown keys, or asks for what is not the same here.
    """
    content = yaml_file.mapping(text, where, "write method: … and deltas: …")
    return _mergekits(content, where) if "merge_method" in content else _own(content, where)


def _own(content: Mapping[str, Any], where: str) -> Asked:
    file: Any = knobs.decode(_File, content, where)
    plain = [{"ref": s} if isinstance(s, str) else s for s in file.deltas]
    for source in plain:
        if not isinstance(source, Mapping):
            raise UsageError(f"{where}: '{source}' is no delta", "write a name, or ref: NAME with coef: and data:")
    sources: list[Any] = [knobs.decode(_Source, s, f"{where}, delta {i + 1}") for i, s in enumerate(plain)]
    lacking = next((s.ref for s in sources if not s.data), "") if any(s.data for s in sources) else ""
    if lacking:
        raise UsageError(f"{where}: {lacking} has no data: and others have", "give data: for every delta, or for none")
    return Asked(
        refs=tuple(s.ref for s in sources), method=file.method, coef=tuple(s.coef for s in sources), layers=file.layers,
        data=tuple(s.data for s in sources) if any(s.data for s in sources) else (), name=file.name, search=file.search,
        by=file.by, refit_heads=file.refit_heads, keep=file.keep,
    )  # fmt: skip


def _mergekits(content: Mapping[str, Any], where: str) -> Asked:
    method = content["merge_method"]
    if method not in MERGEKIT:
        raise UsageError(
            f"{where}: mergekit's '{method}' is not the same here; these are: {', '.join(MERGEKIT)}",
            "write the merge as ours, such as method: dare+ties (see vtzoo merges)",
        )
    if odd := sorted(set(content) - {"merge_method", "models", "parameters", *IGNORED}):
        raise UsageError(f"{where}: '{odd[0]}' has no meaning for deltas of a vision backbone", "leave it out")
    models = content.get("models")
    if not isinstance(models, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("model"), str) for m in models
    ):
        raise UsageError(f"{where}: models is no list of models", "write - model: NAME for each delta")
    models = [m for m in models if m["model"] != content.get("base_model")]
    own = [{**(content.get("parameters") or {}), **(m.get("parameters") or {})} for m in models]
    spec, words = MERGEKIT[method]
    for name, value in (item for p in own for item in p.items()):
        _check(method, name, value, {"weight", "normalize", *words}, where)
    part = knobs.one(spec)
    for theirs, ours in words.items():
        values = {p.get(theirs, 1.0) for p in own}  # 1 is mergekit's default of each
        if len(values) > 1:
            raise UsageError(f"{where}: {theirs} differs from model to model", "give one for all")
        if values:
            part.knobs[ours] = f"{values.pop():g}"
    coef = tuple(float(p.get("weight", 1.0)) for p in own) if method != "model_stock" else None
    return Asked(refs=tuple(m["model"] for m in models), method=str(part), coef=coef)


def _check(method: str, name: str, value: Any, known: Collection[str], where: str) -> None:
    """Refuse a parameter that the method doesn't have here, or has with another meaning."""
    if name not in known:
        raise UsageError(f"{where}: {method} has no '{name}' here", did_you_mean(name, known) or "leave it out")
    if not isinstance(value, int | float):
        raise UsageError(
            f"{where}: {name} is given by layer", "give one number for all, and factors by layer with --layers"
        )
    if name == "normalize" and bool(value) != (method in NORMALIZED):
        raise UsageError(
            f"{where}: normalize: {str(bool(value)).lower()} is not how {method} adds up here", "leave it out"
        )

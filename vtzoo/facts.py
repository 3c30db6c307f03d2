"""What two artifacts say of themselves, knob by knob, side by side."""

import json
from collections.abc import Mapping
from typing import Any, cast

from vtzoo.lineage import Origin, images, parents

_QUIET = ("created", "command", "seconds", "cpu_seconds", "peak_bytes", "size_bytes")


def compared(a: Origin, b: Origin) -> list[dict[str, Any]]:
    """One row a fact that either says: `what`, `a`, `b` (None where it says nothing) and whether they are the `same`."""
    left, right = facts_of(a), facts_of(b)
    names = [*left, *(n for n in right if n not in left)]
    rows = [(n, left.get(n), right.get(n)) for n in names]
    return [{"what": n, "a": x, "b": y, "same": _key(x) == _key(y)} for n, x, y in rows]


def facts_of(origin: Origin) -> dict[str, Any]:
    """What an artifact says of itself, flat; what can only differ by when and where it was made is left out."""
    said, lineage = origin.said, origin.lineage
    found: dict[str, Any] = {"kind": origin.kind, "method": said.get("method") or origin.facts.get("method")}
    config = said.get("config")
    for part in cast("Mapping[str, Any]", config).get("parts", []) if isinstance(config, Mapping) else []:
        found |= _flat(f"{part['method']}.", part.get("knobs", {})) | {f"{part['method']}.sites": len(part["sites"])}
    found |= _flat("backbone.", {k: origin.backbone.get(k) for k in ("name", "arch", "fingerprint", "license")})
    for task in said.get("tasks") or origin.facts.get("tasks") or []:
        own: Mapping[str, Any] = task if isinstance(task, Mapping) else {"name": task}
        found |= _flat(f"task {own.get('name')}.", {k: v for k, v in own.items() if k != "name"} or {"is": "here"})
    for seen in images(lineage):
        name = f"data {seen['task']}".strip()
        found |= {name: seen["data"], f"{name}.images": seen["images"]}
    found |= _flat("recipe.", said.get("recipe") or lineage.get("recipe") or {})
    metrics = said.get("metrics") or origin.facts.get("metrics") or {}
    found |= _flat("metrics.", {k: v for k, v in metrics.items() if k not in _QUIET})
    skipped = ("parents", "teachers", "data", "images", "lessons", "heads_images", "recipe", "tasks")
    found |= _flat("", {k: v for k, v in lineage.items() if k not in skipped}) | {"parents": parents(lineage)}
    if machine := origin.facts.get("machine"):
        found["machine"] = machine
    return {k: v for k, v in found.items() if v not in (None, "", [], {})}


def _flat(prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in found.items():
        rows |= _flat(f"{prefix}{key}.", value) if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

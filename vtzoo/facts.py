"""What two artifacts say of themselves, knob by knob, side by side."""

import json
from collections.abc import Mapping
from typing import Any

from vtzoo.lineage import Origin, images, parents
from vtzoo.spec import as_list, as_map

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
    for part in map(as_map, as_list(as_map(said.get("config")).get("parts"))):
        method = part.get("method")
        found |= _flat(f"{method}.", as_map(part.get("knobs"))) | {f"{method}.sites": len(as_list(part.get("sites")))}
    found |= _flat("backbone.", {k: origin.backbone.get(k) for k in ("name", "arch", "fingerprint", "license")})
    for task in as_list(said.get("tasks")) or as_list(origin.facts.get("tasks")):
        own = as_map(task) or {"name": task}
        found |= _flat(f"task {own.get('name')}.", {k: v for k, v in own.items() if k != "name"} or {"is": "here"})
    for seen in images(lineage):
        name = f"data {seen['task']}".strip()
        found |= {name: seen["data"], f"{name}.images": seen["images"]}
    found |= _flat("recipe.", as_map(said.get("recipe")) or as_map(lineage.get("recipe")))
    metrics = as_map(said.get("metrics")) or as_map(origin.facts.get("metrics"))
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

"""A delta: what one task (or a merge of several) adds to a backbone, in one self-describing safetensors file.

Tensors are named `<site>.<graft>.<param>`; heads `@head/<task>/<timm name>`; base tensors that were resized for
another input size `@base/<name>`. The header's metadata holds one JSON document under `vtzoo`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vtzoo import knobs, machine, registry
from vtzoo.anatomy import Site
from vtzoo.errors import Conflict, Corrupt
from vtzoo.headers import SCHEMA, read_header
from vtzoo.objects import workroom
from vtzoo.refs import shown
from vtzoo.results import leading
from vtzoo.spec import BackboneCard, Task, chosen, plain
from vtzoo.tensors import Lazy, TensorFile, prefixed, view, write
from vtzoo.zoo import Zoo

HEAD, BASE = "@head/", "@base/"
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One method of a stack, resolved: its graft's attribute name, its knobs and its sites."""

    method: str
    graft: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()

    @property
    def module(self) -> Any:
        """The method's module (see methods/__init__ for its protocol)."""
        return registry.load("methods", self.method)

    @property
    def config(self) -> Any:
        """The knobs as the method's own Config."""
        return knobs.decode(self.module.Config, self.knobs, self.method)

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "method": self.method,
            "graft": self.graft,
            "knobs": plain(dict(self.knobs)),
            "sites": [s.json() for s in self.sites],
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Part":
        """From a header's JSON.

        Raises:
            ValueError: its method or graft is no word.
        """
        if not (isinstance(data["method"], str) and isinstance(data["graft"], str) and _WORD.fullmatch(data["graft"])):
            raise ValueError(f"its part {shown([data['method'], data['graft']])}")
        facts: dict[str, Any] = {**data, "sites": tuple(Site.of(s) for s in data["sites"])}
        return cls(**facts)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """See the module's docstring. `tensors` may be lazy; `method` is the spec as people read it."""

    method: str
    parts: tuple[Part, ...]
    backbone: BackboneCard
    tensors: Mapping[str, Tensor]
    tasks: tuple[Task, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> "Delta":
        """Read a delta; its tensors stay in the file until they are asked for.

        Raises:
            NotFound: no such file.
            Corrupt: damaged, or a safetensors file that is no delta.
        """
        path = Path(path)
        doc = read_header(path)
        try:
            if not isinstance(doc["method"], str):
                raise TypeError("its method")  # noqa: TRY301 - as all that is garbled
            return cls(
                method=doc["method"],
                parts=tuple(Part.of(p) for p in doc["config"]["parts"]),
                backbone=BackboneCard.of(doc["backbone"]["name"], doc["backbone"]),
                tensors=TensorFile(path),
                tasks=tuple(Task.of(t) for t in doc["tasks"]),
                metrics=doc["metrics"],
                recipe=doc.get("recipe", {}),
                lineage=doc["lineage"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(
                f"{path}: the delta's header lacks or garbles {error}", "make the delta again, or fetch it again"
            ) from error

    def save(self, path: str | Path, *, workers: int = 1) -> str:
        """Write the file atomically; the same tensors and facts give the same bytes. Returns its sha256.

        `workers` tensors are computed at once, where the tensors are lazy.
        """
        return write(Path(path), self.tensors, {"vtzoo": json.dumps(self.header(), sort_keys=True)}, workers=workers)

    def header(self) -> dict[str, Any]:
        """The JSON document of the file."""
        return plain(
            {
                "schema": SCHEMA,
                "method": self.method,
                "config": {"parts": [p.json() for p in self.parts]},
                "backbone": {"name": self.backbone.name, **self.backbone.json()},
                "tasks": [t.json() for t in self.tasks],
                "metrics": self.metrics,
                "recipe": self.recipe,
                "lineage": self.lineage,
            }
        )

    def task(self, name: str | None = None) -> Task:
        """A task by name; without a name the only one.

        Raises:
            NotFound: no such task, or several and none named.
        """
        return chosen(self.tasks, name, "this delta")

    def head(self, task: str) -> Lazy:
        """A task's head tensors under their timm names."""
        return prefixed(self.tensors, f"{HEAD}{task}/")

    @property
    def overrides(self) -> Lazy:
        """Base tensors resized for this delta's input size."""
        return prefixed(self.tensors, BASE)

    def with_(self, **changes: Any) -> "Delta":
        """A copy with other facts."""
        return replace(self, **changes)

    @property
    def size(self) -> int:
        """How many numbers the delta holds, heads left out."""
        return sum(t.numel() for n, t in self.tensors.items() if not n.startswith(("@",)))


def is_linear(head: Mapping[str, Any]) -> bool:
    """Whether a head's names are those of one layer."""
    return sorted(n.rpartition(".")[2] for n in head) in (["weight"], ["bias", "weight"])


def head_parts(delta: Delta) -> tuple[Part, ...]:
    """The methods that build a delta's heads, where these are more than one layer each and can't be written as the backbone's own."""
    plain = all(is_linear(delta.head(task.name)) for task in delta.tasks)
    own = (p for p in delta.parts if hasattr(p.module, "head") and not hasattr(p.module, "fold_head"))
    return () if plain else tuple(own)


def renamed(delta: Delta, old: str, new: str) -> Delta:
    """The same delta with another name for one of its tasks.

    Raises:
        NotFound: it has no such task.
        Conflict: it has a task of the new name.
    """
    task = delta.task(old)
    if any(t.name == new for t in delta.tasks):
        raise Conflict(f"this delta has a task '{new}' already", "choose another name")
    own, moved = delta.tensors, {f"{HEAD}{old}/{n}": f"{HEAD}{new}/{n}" for n in delta.head(old)}
    names = {moved.get(n, n): n for n in own}
    tasks = tuple(replace(t, name=new) if t is task else t for t in delta.tasks)
    return delta.with_(tensors=view(own, names), tasks=tasks)


def with_heads(delta: Delta, heads: Mapping[str, Tensor]) -> Delta:
    """The same delta with other heads' tensors in place of all, by their full names."""
    own = delta.tensors
    rest = view(own, {n: n for n in own if not n.startswith(HEAD)})
    makers = {n: (lambda n=n: rest[n]) for n in rest} | {n: (lambda t=t: t) for n, t in heads.items()}
    shapes = {n: rest.shape(n) for n in rest} | {n: tuple(t.shape) for n, t in heads.items()}
    dtypes = {n: d for n in rest if (d := rest.dtype(n))} | {n: t.dtype for n, t in heads.items()}
    return delta.with_(tensors=Lazy(makers, shapes, dtypes))


def stored(delta: Delta, zoo: Zoo) -> tuple[str, int]:
    """Store a delta's file in a zoo, written on the zoo's own disk; gives its digest and size in bytes.

    Raises:
        Resources: the disk is full.
    """
    with workroom(zoo.root) as folder:
        path = folder / "delta.safetensors"
        delta.save(path)
        return zoo.add_object(path), path.stat().st_size


def listed(delta: Delta, zoo: Zoo, name: str, cost: Mapping[str, float | None]) -> str:
    """Store a delta that was made here, and list it with what its making took of this machine; gives its digest.

    Args:
        delta: with its metrics.
        zoo: where.
        name: of the entry.
        cost: seconds and cpu_seconds.

    Raises:
        Conflict: the name exists.
        Resources: the disk is full.
    """
    digest, size = stored(delta, zoo)
    zoo.put(
        "deltas", name,
        {
            "digest": digest, "size_bytes": size, "method": delta.method, "backbone": delta.backbone.name,
            "fingerprint": delta.backbone.fingerprint, "license": delta.backbone.license, "tasks": [t.name for t in delta.tasks],
            "metrics": leading(delta.metrics.get("test") or delta.metrics.get("val") or {}), **cost,
            "peak_bytes": machine.peak_bytes(), "machine": machine.told(),
        },
    )  # fmt: skip
    return digest

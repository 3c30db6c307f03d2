"""What the tests of merges share: real deltas of tiny backbones, made-up ones of any shape, and mappings that watch."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

import vtzoo
from tests import families
from vtzoo import knobs, registry
from vtzoo.anatomy import Site
from vtzoo.delta import Delta, Part
from vtzoo.fingerprint import base_state, fingerprint
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import extract, inject
from vtzoo.merges._chain import curious, steps
from vtzoo.spec import BackboneCard, Task
from vtzoo.tensors import Lazy, shape_of

MERGES = [m for m in registry.names("merges") if getattr(registry.load("merges", m), "STAGE", "") != "heads"]
"""All that give tensors: what corrects heads afterwards is tested in tests/unit/test_merge_looks.py."""
SYMMETRIC = [m for m in MERGES if registry.load("merges", m).SYMMETRIC]
NEUTRAL = [m for m in MERGES if getattr(registry.load("merges", m), "NEUTRAL", True)]
QUICK = ("cat", "core", "dare", "emr", "esm", "linear", "pcb", "regmean-plus", "slerp", "svc", "ties", "tsv")
"""One of each kind, for the tests that take long: the others run with `make test-all`."""
MASKED = [m for m in MERGES if hasattr(registry.load("merges", m), "mask")]
"""They keep a network of its own for each task."""
CHAINS = ("dare+ties", "knots+dare+ties", "core+ties", "ties+svc", "task-arithmetic+svc+lines", "della+knots+sce+lines")
"""Specs of several steps, beside the registry's own."""


def each(merges: Sequence[str]) -> list[Any]:
    """Merges as parameters of a test, those that aren't QUICK marked slow."""
    return [m if m in QUICK or m in CHAINS[:2] else pytest.param(m, marks=pytest.mark.slow) for m in merges]


def neutral(merge: str) -> str:
    """The spec, with the merge that it implies, and density and scale at 1."""
    parts = [knobs.Part(s.part.name, {k: "1" for k in s.knobs if k in ("density", "scale")}) for s in steps(merge)]
    return "+".join(map(str, parts))


def some(merge: str, deltas: list[Delta]) -> list[Delta]:
    """As many of the deltas as the merge takes."""
    return deltas[: getattr(registry.load("merges", knobs.parse(merge)[0].name), "TASKS", len(deltas))]


def told(spec: str, deltas: Sequence[Delta], base: Mapping[str, Tensor]) -> list[Lazy] | None:
    """Made-up evidence of each task's images, where a merge needs it: the same for a task whatever the order."""
    step = curious(steps(spec))
    return [_told(step.module, d.tasks[0].name if d.tasks else "", base) for d in deltas] if step else None


def _told(module: Any, task: str, base: Mapping[str, Tensor]) -> Lazy:
    def make(name: str) -> Tensor:
        draw, shape = torch.Generator().manual_seed(crc32(f"{task}/{name}".encode())), shape_of(base, name)
        if getattr(module, "EVIDENCE", "") == "fisher":
            return torch.rand(shape, generator=draw)
        if module.__name__.endswith(("adamerging", "greedy_soup")):
            return torch.tensor(1.0)
        rows = torch.randn(40, math.prod(shape[1:]), generator=draw)
        return rows.T @ rows

    return Lazy({n: (lambda n=n: make(n)) for n in base}, {})


def joined(deltas: Sequence[Delta], spec: str, *, base: Mapping[str, Tensor], **options: Any) -> Delta:
    """`vtzoo.merge`, with evidence where the merge needs it."""
    return vtzoo.merge(deltas, spec, base=base, evidence=told(spec, deltas, base), **options)


@cache
def base_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A tiny backbone's tensors (shared, never changed)."""
    return base_state(families.build(family, dtype=dtype))


@cache
def real(spec: str, family: str, task: str = "", dtype: torch.dtype = torch.float32) -> Delta:
    """A delta of a method on a tiny backbone, none of whose tensors is at its start (shared, never changed)."""
    model = inject(families.build(family, dtype=dtype), spec, batches=families.labelled(family, dtype=dtype))
    families.perturb(tensors_of(model))
    families.perturb(head_state(model), seed=len(spec))
    name = task or spec.partition("[")[0]
    return extract(model, tasks=[Task(name=name, classes=tuple("abcde"))])


def stored(vectors: dict[str, Tensor], base: dict[str, Tensor], task: str = "t") -> Delta:
    """A `full` delta with these task vectors, and a head that is its own."""
    sites: dict[str, dict[str, list[int]]] = {}
    for name, value in vectors.items():
        module, _, param = name.rpartition(".")
        sites.setdefault(module, {})[param] = list(value.shape)
    places = {n: ".".join([*n.split(".")[:-1], "full", n.rpartition(".")[2]]) for n in vectors}
    tensors = {places[n]: base[n] + v for n, v in vectors.items()}
    tensors[f"@head/{task}/head.weight"] = torch.full((2, 3), float(len(task)))
    part = Part(
        method="full", graft="full",
        sites=tuple(Site(name=m, kind="params", facts={"params": p}) for m, p in sites.items()),
    )  # fmt: skip
    tasks = (Task(name=task, classes=("a", "b")),)
    card = BackboneCard(name="tiny", arch="tiny", fingerprint=fingerprint(base))
    return Delta(method="full", parts=(part,), backbone=card, tensors=tensors, tasks=tasks)


def random_deltas(count: int, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[Delta]]:
    """A random base, of two blocks at least, and random `full` deltas of it."""
    draw = torch.Generator().manual_seed(0)
    base, *rows = [{n: torch.randn(s, generator=draw) for n, s in shapes.items()} for _ in range(count + 1)]
    base |= {f"blocks.{i}.own": torch.zeros(1) for i in range(2)}
    return base, [stored({n: 0.1 * v for n, v in row.items()}, base, f"t{i}") for i, row in enumerate(rows)]


def same(a: Delta, b: Delta, besides: Sequence[str] = ()) -> bool:
    """Whether two deltas hold the same bits under the same names, some left out."""
    names = [n for n in a.tensors if n not in besides]
    return sorted(a.tensors) == sorted(b.tensors) and all(torch.equal(a.tensors[n], b.tensors[n]) for n in names)


def copies(tensors: dict[str, Tensor]) -> Lazy:
    """Tensors as a file gives them: new ones at every access."""
    shapes = {n: tuple(v.shape) for n, v in tensors.items()}
    return Lazy({n: (lambda v=v: v.clone()) for n, v in tensors.items()}, shapes)

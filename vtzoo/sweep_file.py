"""Sweeps written down: tasks x backbones x methods x knobs x seeds, in blocks that inherit what stands above them.

name: eight-tasks
tasks: {fashion: vtzoo:fashion, clothing: $IMAGES/clothing}      variables of the environment are filled in
seeds: [0, 1, 2]
recipe: {epochs: 5, limit: 500}                                  training knobs of every run
grid: {lr: [1e-3, 1e-2], lora.rank: [4, 8]}                      every combination; METHOD.KNOB is a method's own knob
runs:                                                            one block for each, or leave `runs` out
- backbones: vit_embedded_64
  methods: [linear, lora, ssf]
- backbones: tf_efficientnet_lite0
  methods: [linear, bitfit]
  tasks: [fashion]                                               a choice of those above
  recipe: {image_size: 112}                                      over the recipe above
final: {recipe: {train_on: train+val}, seeds: [0, 1, 2]}         then the knobs that were best on the validation images, again
engine: {gpus: 0.5, asha: {grace_epochs: 2}}                     what `--engine ray` gives each trial
"""

import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from vtzoo import knobs, registry, yaml_file
from vtzoo.errors import UsageError, did_you_mean
from vtzoo.recipe import Recipe
from vtzoo.refs import check_name

DIGITS = 10
"""Of a run's digest, in the name of what it makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): of runs with as many epochs, one in `reduction` goes on."""

    grace_epochs: Annotated[int, Field(ge=1)] = 1
    reduction: Annotated[float, Field(gt=1)] = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What a trial gets of a cluster: processors and GPUs, also parts of one; and where the cluster is, if not found or started here."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    address: str = ""
    asha: Asha | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Final:
    """What is trained at the end, of each task, backbone and method: the knobs that were best on the validation images, with these seeds."""

    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a task, a backbone, a method, a seed, and the training knobs that the file gives.

    `stack` is the method without the grid's knobs: what the runs that are compared with each other have in common.
    """

    task: str
    data: str
    backbone: str
    method: str
    seed: int
    recipe: Mapping[str, Any]
    stack: str = ""

    def digest(self, network: str, images: str) -> str:
        """Sha256 of all that the result depends on but for the program's version: what the run is found again by.

        Args:
            network: what stands for the backbone: weights, architecture, preprocessing.
            images: what stands for the images of all splits.
        """
        facts = [self.task, network, images, self.method, self.seed, dict(self.recipe)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def name(self, digest: str) -> str:
        """What the delta is called: TASK/METHODS-DIGEST."""
        words = "-".join(p.name.replace("/", "-") for p in knobs.parse(self.method))
        return check_name(f"{self.task}/{words[:60]}-{digest[:DIGITS]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A file read: its name, its cells in the order in which they share most, what follows them, and what its engine is to know."""

    name: str
    cells: tuple[Cell, ...]
    final: Final | None = None
    engine: Engine = field(default_factory=Engine)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """What a block says; `tasks` maps names to data, or chooses names that stand above."""

    tasks: dict[str, str] | list[str] = field(default_factory=dict[str, str])
    backbones: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    grid: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])


@dataclass(frozen=True, kw_only=True, slots=True)
class _File(_Block):
    name: str
    runs: tuple[dict[str, Any], ...] = ()
    final: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict[str, Any])


def read(text: str, where: str) -> Sweep:
    """Read a file's text; `where` names it in messages.

    Raises:
        UsageError: it is no YAML, has unknown keys or knobs, an empty part, or a variable that isn't set.
        NotFound: no such method.
    """
    content = yaml_file.mapping(text, where, "write tasks: …, backbones: … and methods: …")
    if not content.get("name"):
        raise UsageError(f"{where} has no name", "write name: my-sweep at its top")
    _check_seeds(content, where)
    file: Any = knobs.decode(_File, content, where)
    above = {f.name: getattr(file, f.name) for f in fields(_Block)}
    blocks = [_block(above, own, f"{where}, run {i + 1}") for i, own in enumerate(file.runs or ({},))]
    cells = {json.dumps(asdict(c), sort_keys=True): c for block in blocks for c in _cells(block, where)}
    _check_tasks(cells.values(), where)
    engine: Any = knobs.decode(Engine, file.engine, f"{where}, engine")
    final: Any = None if file.final is None else knobs.decode(Final, file.final, f"{where}, final")
    if final is not None:
        _check_seeds(file.final or {}, f"{where}, final")
        final = replace(final, recipe=_recipe(final.recipe, f"{where}, final"))
        _check_final(cells.values(), final, where)
    return Sweep(name=check_name(file.name), cells=tuple(cells.values()), final=final, engine=engine)


def _check_seeds(said: Mapping[str, Any], where: str) -> None:
    """Refuse `seeds: 5`, which one reader takes for a seed and another for a number of them."""
    if "seeds" in said and not isinstance(said["seeds"], list):
        raise UsageError(f"{where}: seeds is no list", "write seeds: [0] for one, or [0, 1, 2] for three")


def _check_tasks(cells: Iterable[Cell], where: str) -> None:
    """Refuse a name that stands for several data sets: their results would be taken for one another's.

    Raises:
        UsageError: there is one.
    """
    data: dict[str, str] = {}
    for cell in cells:
        if data.setdefault(cell.task, cell.data) != cell.data:
            both = f"{data[cell.task]} and {cell.data}"
            raise UsageError(f"{where}: the task '{cell.task}' is {both}", "give each a name of its own")


def _check_final(cells: Iterable[Cell], final: Final, where: str) -> None:
    """Refuse a search that can't choose, and finals that could not be trained.

    Raises:
        UsageError: no validation, no seeds, knobs that contradict each other, or many probes at once where finals don't validate.
    """
    if not final.seeds:
        raise UsageError(f"{where}, final has no seeds", "write seeds: [0], or leave it out")
    methods: dict[str, set[str]] = {}
    for cell in cells:
        methods.setdefault(json.dumps(dict(cell.recipe), sort_keys=True), set()).add(cell.method)
    for text, own in methods.items():
        recipe = json.loads(text)
        decoded: Any = knobs.decode(Recipe, recipe, where)
        if not decoded.validates:
            raise UsageError(f"{where}: knobs are chosen on validation images, and none are measured", "eval_on: val")
        last: Any = knobs.decode(Recipe, {**_foldless(recipe), **final.recipe}, f"{where}, final")
        if not last.validates and last.eval_on == "val":
            raise UsageError(
                f"{where}: nothing is left for the finals to measure", "final: {recipe: {eval_on: val+test}}"
            )
        many = sorted(m for m in own if any(p.name == "linear" and p.knobs for p in knobs.parse(m)))
        if many and not last.validates:
            raise UsageError(
                f"{where}: {many[0]} chooses on validation images, and finals measure none",
                "write methods: [linear], and grid: {lr: […], weight_decay: […]}",
            )


def finals(sweep: Sweep, scores: Sequence[float]) -> list[Cell]:
    """The cells that follow: of each task, backbone and method the best knobs by their mean over seeds, of several the first.

    Args:
        sweep: with a `final`.
        scores: of its cells, in their order.
    """
    assert sweep.final is not None
    by_knobs: dict[tuple[str, ...], dict[str, list[tuple[float, Cell]]]] = {}
    for cell, score in zip(sweep.cells, scores, strict=True):
        knobs_of = json.dumps([cell.method, _foldless(cell.recipe)], sort_keys=True)
        own = by_knobs.setdefault((cell.task, cell.backbone, cell.stack), {})
        own.setdefault(knobs_of, []).append((score, cell))
    best = [max(own.values(), key=lambda runs: statistics.fmean(s for s, _ in runs))[0][1] for own in by_knobs.values()]
    recipe = sweep.final.recipe
    return [replace(c, recipe={**_foldless(c.recipe), **recipe}, seed=s) for c in best for s in sweep.final.seeds]


def _foldless(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Folds are drawn as seeds are: what is chosen is chosen over all of them."""
    return {k: v for k, v in recipe.items() if k not in ("fold", "folds")}


def _block(above: Mapping[str, Any], own: Mapping[str, Any], where: str) -> _Block:
    """A block with what it inherits: its recipe and grid add to those above, all else replaces."""
    _check_seeds(own, where)
    block: Any = knobs.decode(_Block, {**above, **own}, where)
    block = replace(
        block, recipe={**above["recipe"], **(own.get("recipe") or {})}, grid={**above["grid"], **(own.get("grid") or {})}
    )  # fmt: skip
    if isinstance(block.tasks, list):
        known = above["tasks"] if isinstance(above["tasks"], dict) else {}
        for name in block.tasks:
            if name not in known:
                raise UsageError(
                    f"{where}: no task '{name}' stands above",
                    did_you_mean(name, known) or "write tasks: {NAME: DATA} there",
                )
        block = replace(block, tasks={name: known[name] for name in block.tasks})
    for what in ("tasks", "backbones", "methods", "seeds"):
        if not getattr(block, what):
            raise UsageError(f"{where} has no {what}", f"write {what}: … there, or above all runs")
    return block


def _cells(block: _Block, where: str) -> Iterator[Cell]:
    assert isinstance(block.tasks, dict)
    _check_grid(block, where)
    tasks = [(name, _filled(data, where)) for name, data in block.tasks.items()]
    methods = [_sorted(knobs.parse(m)) for m in block.methods]
    for backbone, (task, data), method, chosen in product(
        block.backbones, tasks, methods, product(*block.grid.values())
    ):
        asked = dict(zip(block.grid, chosen, strict=True))
        own = {k: v for k, v in asked.items() if "." in k}
        recipe = _recipe({**block.recipe, **{k: v for k, v in asked.items() if k not in own}}, where)
        for seed in block.seeds:
            yield Cell(
                task=task,
                data=data,
                backbone=backbone,
                method=_with_knobs(method, own, where),
                seed=seed,
                recipe=recipe,
                stack=method,
            )


def _sorted(parts: Iterable[knobs.Part]) -> str:
    """A stack with the knobs of each part in one order: two that differ in it alone are one."""
    return "+".join(str(knobs.Part(p.name, dict(sorted(p.knobs.items())))) for p in parts)


def _check_grid(block: _Block, where: str) -> None:
    """Refuse a grid that does nothing.

    Raises:
        UsageError: an empty list, a knob of a method that isn't there, or one that a method gives itself.
    """
    parts = [p for m in block.methods for p in knobs.parse(m)]
    for key, values in block.grid.items():
        name, dot, knob = key.partition(".")
        if not values:
            raise UsageError(f"{where}: grid.{key} is empty", "give it values, or leave it out")
        if dot and name not in (names := {p.name for p in parts}):
            raise UsageError(f"{where}: grid has {key}, and no method is {name}", did_you_mean(name, names))
        if dot and any(p.name == name and knob in p.knobs for p in parts):
            raise UsageError(f"{where}: {name} has {knob} of its own, and grid.{key} gives it, too", "leave one out")


def _with_knobs(method: str, own: Mapping[str, Any], where: str) -> str:
    """A stack with knobs METHOD.KNOB put in, where it has that method.

    Raises:
        NotFound: no such method.
        UsageError: it has no such knob.
    """
    parts = knobs.parse(method)
    for key, value in own.items():
        name, _, knob = key.partition(".")
        known = [k.name for k in registry.card("methods", name).knobs]
        if knob not in known:
            raise UsageError(f"{where}: {name} has no knob '{knob}'", did_you_mean(knob, known) or "leave it out")
        text = [str(v) for v in value] if isinstance(value, list) else str(value)
        parts = [knobs.Part(p.name, {**p.knobs, knob: text}) if p.name == name else p for p in parts]
    return _sorted(parts)


def _recipe(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The knobs that were given, as what they mean: "1e-3" and 0.001 are one.

    Raises:
        UsageError: no such knob, or a wrong value.
    """
    if "seed" in values:
        raise UsageError(f"{where}: seed stands among the knobs of training", "write seeds: [0, 1, 2]")
    decoded = knobs.decode(Recipe, values, where)
    return {k: getattr(decoded, k) for k in sorted(values)}


def _filled(text: str, where: str) -> str:
    """A path with the environment's variables filled in.

    Raises:
        UsageError: one isn't set.
    """
    filled = os.path.expandvars(text)
    if missing := re.search(r"\$\{?(\w+)", filled):
        raise UsageError(f"{where}: ${missing[1]} is not set", f"export {missing[1]}=FOLDER first")
    return filled

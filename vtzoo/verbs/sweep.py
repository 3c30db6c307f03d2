"""Many trainings from one file: tasks x backbones x methods x knobs x seeds, each once, wherever they run."""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vtzoo import data as D
from vtzoo import knobs, machine, registry, rows, talk, tracking
from vtzoo.artifact import resolved_card
from vtzoo.engines import Failure, Watch, local, ray
from vtzoo.errors import Corrupt, Interrupted, NotFound, UsageError, VtzooError
from vtzoo.fit import checkpoint_path, forget
from vtzoo.recipe import read
from vtzoo.results import Swept, Trained
from vtzoo.spec import plain
from vtzoo.standings import score, standings
from vtzoo.sweep_file import Cell, Sweep, finals
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A cell, what its delta is called, how many images it may train on, and what its process is to know; it can be pickled."""

    cell: Cell
    name: str
    images: int
    zoo: Path
    command: str
    threads: int
    track: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _At:
    """Where and how a sweep is run; `table` is its table in the zoo."""

    spec: Sweep
    zoo: Zoo
    engine: str
    jobs: int
    retries: int
    table: Path
    track: tuple[str, ...]


def sweep(
    *, spec: Sweep, zoo: Zoo | None = None, engine: str = "local", jobs: int = 0, retries: int = 2, dry_run: bool = False,
    table: Path | None = None, track: Sequence[str] = (),
) -> Swept:  # fmt: skip
    """Train every cell of a sweep that isn't trained yet, then its finals, and put all of them in one table.

    A run is found again by a digest of its task, data, backbone, method, seed and knobs, which is a part of its delta's name: the same
    call goes on where an earlier one stopped, and sweeps share runs. Inside a run its checkpoint is taken up.

    Args:
        spec: see `vtzoo.sweep_file.read`.
        zoo: where the deltas go, and what the runs share: backbones and kept features.
        engine: "local" (processes) or "ray" (a cluster, or one started here).
        jobs: runs at once in the local engine; 0 means one for each GPU, or for every two processors.
        retries: how often a run whose process died is tried again.
        dry_run: count, and take two steps of one run of each backbone and method, which tells how long they take, or why not.
        table: a copy of the table, .jsonl or .parquet.
        track: see `vtzoo.verbs.train.train`.

    Returns:
        `path` is the table in the zoo, `report` counts runs, done (before this call), made and stopped (by ASHA, at any time), and
        has standings and rows; of a dry run names, finals, and the `plan`: backbone, method, runs that are left, seconds of all of them.

    Raises:
        UsageError, NotFound, Corrupt: before the first run starts; what a backbone refuses only in a dry run.
        Interrupted: stopped; the same call goes on.
        VtzooError: some runs failed; all others are kept.
    """
    zoo = zoo or Zoo.find()
    _check(engine, table, track)
    at = _At(
        spec=spec, zoo=zoo, engine=engine, jobs=jobs or torch.cuda.device_count() or max(1, machine.processors() // 2), retries=retries,
        table=zoo.root / ".vtzoo" / "sweeps" / f"{spec.name}.jsonl", track=tuple(track),
    )  # fmt: skip
    runs, stopped = _named(at, spec.cells), _stopped(at.table)
    report: dict[str, Any] = {"runs": 0, "done": 0, "made": 0, "stopped": 0}
    if dry_run:
        todo = _todo(at, runs, stopped)
        report |= {"runs": len(runs), "done": len(runs) - len(todo), "names": [r.name for r in runs]}
        report["finals"] = len(finals(spec, [0.0] * len(runs))) if spec.final else 0
        report["plan"] = _planned(todo)
        return Swept(ref=spec.name, path="", report=report)
    found: list[rows.Row] = []
    for stage, here, own in _stages(at, runs, found):
        todo = _todo(here, own, stopped)
        failed = _all(here, todo, len(own))
        made = _rows(own, failed, zoo, stage)
        found += made
        _write(found, at.table, table)
        if failed:
            raise _failures(failed, len(todo))
        _count(report, own, todo, made)
    report |= {"standings": [asdict(s) for s in standings(found)], "rows": found}
    return Swept(ref=spec.name, path=str(at.table), report=report)


def _check(engine: str, table: Path | None, track: Sequence[str]) -> None:
    """Refuse what no run could do anything about."""
    if engine not in ENGINES:
        raise UsageError(f"no engine is called '{engine}'", f"one of {', '.join(ENGINES)}")
    if engine == "ray":
        ray.check()
    if table is not None:
        rows.check(table)
    tracking.check(track)


def _stages(at: _At, runs: list[Run], found: Sequence[rows.Row]) -> Iterator[tuple[str, _At, list[Run]]]:
    """What is run after what: the runs, and where there are finals, those that the rows `found` meanwhile have chosen, to their end."""
    if at.spec.final is None:
        yield "", at, runs
        return
    yield "search", at, runs
    known = {r["ref"]: value for r in found if (value := score(r, "val_")) is not None}
    own = [known.get(r.name, -1.0) for r in runs]  # what was stopped is worse than any
    last = replace(at, spec=replace(at.spec, engine=replace(at.spec.engine, asha=None)))
    yield "final", last, _named(last, finals(at.spec, own))


def _count(report: dict[str, Any], runs: Sequence[Run], todo: Sequence[Run], made: Sequence[rows.Row]) -> None:
    early = {r["ref"] for r in made if r.get("stopped")}
    report["runs"] += len(runs)
    report["done"] += len(runs) - len(todo)
    report["made"] += sum(r.name not in early for r in todo)
    report["stopped"] += len(early)


def _write(found: Sequence[rows.Row], own: Path, copy: Path | None) -> None:
    own.parent.mkdir(parents=True, exist_ok=True)
    for path in (own, copy):
        if path is not None:
            rows.write(path, found)


def _todo(at: _At, runs: Sequence[Run], stopped: Collection[str]) -> list[Run]:
    """The runs that nobody has made, nor an engine stopped."""
    ended = {e.name for e in at.zoo.entries("deltas")}.union(stopped)
    return list({r.name: r for r in runs if r.name not in ended}.values())


def run_one(run: Run, watch: Watch) -> None:
    """Train one cell, from the checkpoint of an earlier try where there is one; `watch` is told each epoch's record.

    Raises:
        VtzooError: as `train`.
    """
    from filelock import FileLock

    zoo, checkpoint = Zoo(run.zoo), checkpoint_path(run.zoo, run.name, "delta")
    zoo.command = run.command
    torch.set_num_threads(run.threads)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.with_suffix(".lock")
    with FileLock(lock):  # another sweep may have the same run
        try:
            if run.name not in zoo.index()["deltas"]:
                _train(run, zoo, resume=checkpoint.is_file(), watch=watch, track=run.track)
        finally:
            with suppress(OSError):
                lock.unlink()


def _train(run: Run, zoo: Zoo, **more: Any) -> Trained:
    cell = run.cell
    recipe = {**cell.recipe, "seed": cell.seed}
    return train(
        backbone=cell.backbone, data=cell.data, method=cell.method, name=run.name, zoo=zoo, recipe=recipe, **more
    )


def _planned(todo: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each backbone and method the runs to do, and the seconds that they will take, by two steps of the first of them.

    Raises:
        VtzooError: some would be refused.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in todo:
        groups.setdefault((run.cell.backbone, run.cell.stack), []).append(run)
    plan, refused = list[dict[str, Any]](), list[VtzooError]()
    for (backbone, method), runs in groups.items():
        try:
            made = _train(runs[0], Zoo(runs[0].zoo), dry_run=True)
        except VtzooError as error:
            refused.append(type(error)(f"{method} on {backbone}: {error.message}", error.hint))
        else:
            assert made.plan is not None
            seconds = made.plan["seconds"] * sum(map(_work, runs)) / _work(runs[0])
            plan.append({"backbone": backbone, "method": method, "runs": len(runs), "seconds": seconds})
    if len(refused) > 1:
        first = refused[0]
        raise VtzooError(f"{len(refused)} of {len(groups)} can't be trained; the first, {first.message}", first.hint)
    if refused:
        raise refused[0]
    return plan


def _work(run: Run) -> float:
    """What a run's time goes with: the images that it trains on in all its epochs."""
    parts = [(p.name, registry.card("methods", p.name).group) for p in knobs.parse(run.cell.method)]
    recipe = read(run.cell.recipe, parts)
    return (recipe.epochs + recipe.probe_epochs) * min(run.images, recipe.limit or run.images) or 1.0


def _named(at: _At, cells: Sequence[Cell]) -> list[Run]:
    """The runs of cells, in their order, with the names that they will have; whatever can be refused now is."""
    zoo, threads = at.zoo, max(1, min(torch.get_num_threads(), machine.processors() // at.jobs))

    @cache
    def images(data: str) -> tuple[str, int]:
        splits = [D.open_data(data, split=s, several=True) for s in ("train", "val")]
        with suppress(NotFound):
            splits.append(D.open_data(data, split="test", several=True))
        return " ".join(s.digest for s in splits), len(splits[0])

    @cache
    def network(backbone: str) -> str:
        card = resolved_card(backbone, zoo)
        own = {"fingerprint": card.fingerprint or backbone, "arch": card.arch, "model_args": plain(card.model_args)}
        return json.dumps({**own, **asdict(card.preprocess)}, sort_keys=True)

    for method in dict.fromkeys(c.method for c in cells):
        for part in knobs.parse(method):
            knobs.decode(registry.load("methods", part.name).Config, part.knobs, part.name)
    counts = [images(c.data)[1] for c in cells]
    names = [c.name(c.digest(network(c.backbone), images(c.data)[0])) for c in cells]
    cells = [
        replace(c, data=str(Path(c.data).expanduser().absolute())) if Path(c.data).expanduser().exists() else c
        for c in cells
    ]
    return [
        Run(cell=c, name=n, images=i, zoo=zoo.root, command=zoo.command, threads=threads, track=at.track)
        for c, n, i in zip(cells, names, counts, strict=True)
    ]


def _outcomes(at: _At, todo: Sequence[Run]) -> Iterator[tuple[Run, Failure | None]]:
    if at.engine == "ray":
        folder = at.zoo.root / ".vtzoo" / "ray" / f"{at.spec.name}-{os.getpid()}"
        groups = [f"{r.cell.task} {r.cell.backbone}" for r in todo]
        return ray.run(run_one, todo, asked=at.spec.engine, groups=groups, retries=at.retries, folder=folder)
    return local.run(run_one, todo, jobs=at.jobs, retries=at.retries, preload=["vtzoo.verbs.train"], cards=_cards())


def _cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = [c.strip() for c in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if c.strip()]
    return (named or [str(i) for i in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def _all(at: _At, todo: Sequence[Run], runs: int) -> dict[str, Failure]:
    """Let all that is to be done of so many runs end; what failed, by name."""
    talk.say(f"{at.spec.name}: {runs} runs, {runs - len(todo)} of them done before")
    failed: dict[str, Failure] = {}
    if not todo:
        return failed
    started, done, count, outcomes = time.monotonic(), 0, len(todo), _outcomes(at, todo)
    try:
        with closing(outcomes):  # type: ignore[type-var] - engines are generators
            for run, failure in talk.track(outcomes, "runs", count):
                done += 1
                left = (time.monotonic() - started) / done * (count - done)
                said = f": {failure.message}" if failure else ""
                talk.say(f"{done}/{count} {run.name} (seed {run.cell.seed}, {left / 60:.0f} min left){said}")
                if failure:
                    failed[run.name] = failure
                    if failure.traceback:
                        talk.say(failure.traceback)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted after {done} of {count} runs", "the same command goes on from there") from None
    return failed


def _failures(failed: Mapping[str, Failure], count: int) -> VtzooError:
    name, first = next(iter(failed.items()))
    return VtzooError(
        f"{len(failed)} of {count} runs failed; the first, {name}: {first.message}",
        first.hint or "mend it, and repeat the command: what is done is not done again",
    )


def _rows(runs: Sequence[Run], failed: Collection[str], zoo: Zoo, stage: str) -> list[rows.Row]:
    """A row for each run that is in the zoo, or that its engine has stopped; each with what it was asked for.

    They are marked with the stage, if it has a name. A final's `spec` is the method without the knobs that were chosen, which may differ from task to task.
    """
    entries = {e.name: e for e in zoo.entries("deltas")}
    found: list[rows.Row] = []
    for run in {r.name: r for r in runs if r.name not in failed}.values():
        asked = {"spec": run.cell.stack if stage == "final" else run.cell.method, "data": run.cell.data}
        asked |= {"stage": stage} if stage else {}
        if run.name in entries:
            found.append({**rows.row_of(entries[run.name], zoo), **asked})
            continue
        facts = {"task": run.cell.task, "backbone": run.cell.backbone, "method": run.cell.method, "seed": run.cell.seed}
        found.append({"ref": run.name, "stopped": True, **facts, **asked})
        forget(checkpoint_path(run.zoo, run.name, "delta"))
    return found


def _stopped(table: Path) -> set[str]:
    """The runs that an engine has stopped early in an earlier call: they lagged behind, and would again."""
    try:
        return {str(r["ref"]) for r in rows.read(table) if r.get("stopped")} if table.is_file() else set()
    except Corrupt as error:
        talk.say(f"{error.message}: it is written anew, and what was stopped early may be started again")
        return set()

"""Merge deltas of a zoo, or delta files, into one new entry of the zoo; or take a task out of a merge."""

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtzoo import talk
from vtzoo.bases import open_base
from vtzoo.delta import HEAD, Delta
from vtzoo.errors import NotFound, UsageError, did_you_mean
from vtzoo.lineage import check_images, record
from vtzoo.lineage import parents as parents_of
from vtzoo.machine import peak_bytes
from vtzoo.merge_inputs import By, Refit, Search, Wanted, check_wanted, open_delta
from vtzoo.merge_job import (
    PAGE,
    Job,
    Made,
    job_of,
    kept_as,
    outline,
    publish,
    refuse_full,
    room,
    run,
    sound_first,
)
from vtzoo.merges._chain import checks, correcting, steps
from vtzoo.merging import assembled, plan
from vtzoo.objects import workroom
from vtzoo.results import Merged
from vtzoo.tensors import WORKERS, Lazy, dtype_of, shape_of
from vtzoo.zoo import Zoo


def merge_refs(
    *,
    refs: Sequence[str],
    method: str,
    name: str,
    coef: Sequence[float] | None = None,
    layers: str | None = None,
    data: Sequence[str] = (),
    search: Search = "",
    by: By = "agreement",
    refit_heads: Refit = "",
    keep: str = "",
    report: str | Path | None = None,
    zoo: Zoo | None = None,
    explain: bool = False,
    dry_run: bool = False,
    awaited: Collection[str] = (),
) -> Merged:
    """Merge deltas and keep the result in the zoo.

    Args:
        refs: deltas of one backbone: names, unique prefixes, or paths.
        method: an algorithm with its knobs, such as "ties[density=0.2]".
        name: of the new delta.
        coef: one weight per ref, all 1 by default.
        layers: factors by tensor name, such as "blocks.0-5:0.3".
        data: one task's images per ref (see `vtzoo.data.open_data`), for merges that need them, for a search, for heads and for
            a report; of the train split where nothing else is said. The merge's lineage says which were looked at.
        search: what is to be found on images: `scale` (one factor on all that is merged, by a grid), `layers` (one for each depth)
            or `coef` (one weight per ref; both by CMA-ES).
        by: what a search compares, on 64 images of each task: `agreement` with each task's own delta and `entropy` need no labels;
            `accuracy` takes labelled images of the val split.
        refit_heads: fit each task's classifier to the merged features, on 256 images: to what the task's own delta says (`expert`)
            or to `labels`.
        keep: "lora" or "lora[rank=16]" keeps each merged matrix as a pair of thin ones.
        report: write a page of what was merged and how the tasks interfere; with `data`, also of what each is worth (500 test images).
        zoo: the zoo to read and to write; by default the one that `Zoo.find` gives.
        explain: also compare the deltas by pair, which reads them once more.
        dry_run: check all that can be checked without reading tensors, report the plan, and merge nothing.
        awaited: digests of the images that may be looked at; others are refused before anything is computed.

    Returns:
        The entry; its report has the parents with their coefficients and norms, how many tensors were touched, the merged
        norm, and what was asked for beside.

    Raises:
        NotFound: a ref, an algorithm or data that isn't there.
        UsageError: a delta given twice, images that are missing or too many, or what `vtzoo.merge` refuses.
        Mismatch: deltas that can't be merged (see `vtzoo.merge`), or images of other classes than the task's.
        Conflict: the name, or the report's file, exists.
        Resources: the disk is full.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("deltas", name)
    place = Path(report) if report is not None else None
    wanted = Wanted(search=search, by=by, refit_heads=refit_heads, keep=keep, report=place, explain=explain)
    check_wanted(wanted)
    job = job_of(zoo, refs, method, coef, layers, data, wanted)
    check_images(awaited, (i.digest for use, own in job.images.items() if use != "test" for i in own))
    return _done(job, name, dry_run=dry_run)


def _done(job: Job, name: str, *, dry_run: bool = False) -> Merged:
    """Plan, merge, publish, and write the page."""
    started, page = time.monotonic(), job.wanted.report
    with sound_first(job):
        made = job.plan()
        talk.say(f"merging {len(job.deltas)} deltas, {len(made.whole.shapes)} tensors, by {made.spec}")
        sizes = room(assembled(made, kept=kept_as(job, made)), job.zoo)
        if dry_run:
            job.sound.result()
            return Merged(ref=name, path="", report=outline(made, job.refs, job.digests) | sizes)
        refuse_full(sizes)
        with workroom(job.zoo.root) as folder:
            found = run(job, made, folder)
            told = found.report | {"seconds": round(time.monotonic() - started, 1)}
            with _reported(page, name, told):
                path = publish(job.zoo, name, found)
    if page is not None:
        told["page"] = str(page)
    return Merged(ref=name, path=str(path), report={k: v for k, v in told.items() if k not in PAGE})


@contextmanager
def _reported(page: Path | None, name: str, told: Mapping[str, Any]) -> Generator[None, None, None]:
    """Write the page, if any; take it back when what follows fails."""
    if page is None:
        yield
        return
    from vtzoo.merge_report import save

    save(page, name, {**told, "peak_bytes": peak_bytes()})
    try:
        yield
    except BaseException:
        for path in (page, page.with_suffix(".json")):
            path.unlink(missing_ok=True)
        raise


def unmerge(*, ref: str, tasks: Sequence[str], name: str, data: Sequence[str] = (), zoo: Zoo | None = None) -> Merged:
    """Take tasks out of a merge: what the rest of its deltas would have made.

    Where all of the rest are in the zoo they are merged anew, by the recipe in the merge's lineage; else, where the merge is a sum or a
    mean, the deltas that leave are subtracted.

    Args:
        ref: a merge.
        tasks: those that leave, with the deltas that brought them.
        name: of the new delta.
        data: images of each delta that stays, for merges that need them.
        zoo: the zoo to read and to write.

    Raises:
        UsageError: no merge, nothing would stay, or it can't be undone.
        NotFound: no such task, or deltas are gone.
        Conflict: the name exists.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("deltas", name)
    digest, merged = open_delta(ref, zoo)
    lineage = merged.lineage
    if lineage.get("verb") != "merge":
        raise UsageError(f"'{ref}' is no merge", "vtzoo show REF tells what an entry was made of")
    known = [t.name for t in merged.tasks]
    for task in tasks:
        if task not in known:
            raise NotFound(f"'{ref}' has no task '{task}'", did_you_mean(task, known))
    entries = {e.digest: e for section in ("models", "deltas") for e in zoo.entries(section)}
    parents = {d: entries[d].name if d in entries else "" for d in parents_of(lineage)}
    brought = {d: list(entries[d].facts.get("tasks", ())) for d, n in parents.items() if n}
    leaving = [d for d, own in brought.items() if set(own) & set(tasks)]
    if missing := sorted(set(tasks) - {t for d in leaving for t in brought[d]}):
        stays_known = all(parents[d] for d in parents if d not in leaving)
        raise NotFound(
            f"no entry of the zoo brought '{missing[0]}' to this merge: it was renamed, given as a file, or is gone",
            "vtzoo show tells the parents' digests" if stays_known else "add its deltas again",
        )
    if spare := sorted({t for d in leaving for t in brought[d]} - set(tasks)):
        raise UsageError(
            f"'{spare[0]}' came with '{tasks[0]}' in one delta",
            f"take both out: --without {tasks[0]} --without {spare[0]}",
        )
    staying = [d for d in parents if d not in leaving]
    if not staying:
        raise UsageError("nothing would stay", "leave at least one task")
    coef = dict(zip(parents_of(lineage), lineage["coef"], strict=True))
    if all(parents[d] for d in staying):
        return _again(merged, [parents[d] for d in staying], [coef[d] for d in staying], name, data, zoo)
    whole, left, rest = (ref, digest, merged), {d: coef[d] for d in leaving}, {d: coef[d] for d in staying}
    return _subtracted(whole, left, rest, [parents[d] for d in leaving], tasks, name, zoo)


def _again(
    merged: Delta, refs: Sequence[str], coef: Sequence[float], name: str, data: Sequence[str], zoo: Zoo
) -> Merged:
    """Merge the rest by the recipe of the whole."""
    lineage = merged.lineage
    searched = lineage.get("searched", {})
    keep = lineage.get("keep", "")
    job = job_of(zoo, refs, lineage["spec"], coef, lineage["layers"] or None, data, Wanted(keep=keep))
    if lineage.get("heads") and not correcting(steps(lineage["spec"])):
        talk.say("the heads are the deltas' own again: they were refitted to the merge as it was")
    levels = searched["found"] if searched.get("what") in ("scale", "layers") else ()
    return _done(replace(job, levels=levels, searched=searched), name)


def _subtracted(
    whole: tuple[str, str, Delta], leaving: dict[str, float], staying: dict[str, float], refs: Sequence[str], tasks: Sequence[str],
    name: str, zoo: Zoo,
) -> Merged:  # fmt: skip
    """Take deltas out of a sum or a mean, without the others."""
    ref, digest, merged = whole
    lineage, chain = merged.lineage, list(steps(merged.lineage["spec"]))
    kind = chain[0].part.name
    if (
        len(chain) > 1
        or kind not in ("linear", "task-arithmetic", "cat")
        or lineage["layers"]
        or lineage.get("searched")
        or lineage.get("keep")
    ):
        raise UsageError(
            f"{lineage['spec']} can't be undone without the deltas that stay, and some are no longer in the zoo",
            "add them again",
        )
    checks(chain, list(staying.values()))
    rest = sum(staying.values())
    if kind == "linear":
        coef = [1 + sum(leaving.values()) / rest, *(-c / rest for c in leaving.values())]
    else:
        coef = [1.0, *(-c * chain[0].knobs.get("scale", 1.0) for c in leaving.values())]
    gone = [_headless(Delta.open(zoo.object(d)), None) for d in leaving]
    made = plan(
        [_headless(merged, tasks), *gone], "task-arithmetic[scale=1]", base=open_base(merged.backbone, zoo), coef=coef
    )
    if made.statistics:
        raise UsageError(
            "running statistics of batch norms are no sum, and can't be subtracted", "add the other deltas again"
        )
    own = assembled(made)
    own = own.with_(
        method=merged.method,
        lineage={
            **lineage,
            **record("merge", staying, packages=("torch",)),
            "coef": list(staying.values()),
            "without": list(leaving),
        },
    )
    with workroom(zoo.root) as folder:
        path = folder / "merged.safetensors"
        report = outline(made, [ref, *refs], [digest, *leaving])
        saved = own.save(path, workers=WORKERS)
        found = Made(delta=own, path=path, digest=saved, report=report)
        return Merged(ref=name, path=str(publish(zoo, name, found)), report=found.report)


def _headless(delta: Delta, tasks: Sequence[str] | None) -> Delta:
    """A delta without some tasks and their heads; without all where none are named."""
    lost = [t.name for t in delta.tasks if tasks is None or t.name in tasks]
    own = delta.tensors
    names = [n for n in own if not n.startswith(tuple(f"{HEAD}{t}/" for t in lost))]
    tensors = Lazy(
        {n: (lambda n=n: own[n]) for n in names},
        {n: shape_of(own, n) for n in names},
        {n: dtype_of(own, n) for n in names},
    )
    return delta.with_(tensors=tensors, tasks=tuple(t for t in delta.tasks if t.name not in lost))

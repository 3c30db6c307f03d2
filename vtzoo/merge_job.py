"""The work of merging: what is found and checked first, what is looked at, and what comes out, still outside the zoo."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vtzoo import talk
from vtzoo.bases import checked_path, tensors_of, weights_path, without_head
from vtzoo.delta import Delta
from vtzoo.errors import Resources, VtzooError
from vtzoo.folding import with_plain_heads
from vtzoo.keeping import LORA, Kept, low_rank, rank_asked
from vtzoo.machine import free_bytes, told
from vtzoo.merge_inputs import Wanted, images_of, open_deltas, refuse_contrary, refuse_twice
from vtzoo.merges._chain import Step, correcting, curious, steps
from vtzoo.merges._checks import weights_of
from vtzoo.merging import Plan, assembled, leveled, look, plan
from vtzoo.tensors import WORKERS, TensorFile, bytes_of, one_thread, write
from vtzoo.zoo import Zoo

if TYPE_CHECKING:
    from torch import Tensor

    from vtzoo._images import Images
    from vtzoo.merges._scene import Scene

T = TypeVar("T")
BATCH = 32
PAGE = ("interference", "backbone", "versions")
"""What only a report's page has."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that was found and checked, nothing computed yet; `levels` are factors by depth that an earlier search found, `searched` what it said.

    That the backbone's tensors are those of its card is found out meanwhile: `sound` raises WrongBackbone if they aren't.
    """

    zoo: Zoo
    refs: Sequence[str]
    digests: Sequence[str]
    deltas: Sequence[Delta]
    base: Mapping[str, "Tensor"]
    sound: "Future[Path]"
    method: str
    coef: Sequence[float] | None
    layers: str | None
    step: Step | None
    told: list[Mapping[str, "Tensor"]]
    images: "Mapping[str, list[Images]]"
    wanted: Wanted
    levels: Sequence[float] = ()
    searched: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def plan(self) -> Plan:
        """The merge."""
        evidence = self.told if self.step else None
        made = plan(self.deltas, self.method, base=self.base, coef=self.coef, layers=self.layers, evidence=evidence)
        made = leveled(made, self.levels) if self.levels else made
        return replace(made, searched=self.searched) if self.searched else made


def job_of(
    zoo: Zoo, refs: Sequence[str], method: str, coef: Sequence[float] | None, layers: str | None, data: Sequence[str],
    wanted: Wanted,
) -> Job:  # fmt: skip
    """Find and check everything that isn't tensors."""
    found = open_deltas(refs, zoo)
    digests, deltas = [d for d, _ in found], [with_plain_heads(d) for _, d in found]
    refuse_twice(refs, digests)
    chain = steps(method)
    refuse_contrary(chain, wanted)
    step = curious(chain)
    images = images_of(refs, deltas, data, chain, method, wanted)
    weights_of(coef, len(deltas))
    card = deltas[0].backbone
    return Job(
        zoo=zoo, refs=refs, digests=digests, deltas=deltas, base=without_head(tensors_of(weights_path(card, zoo), card), card.head),
        sound=_meanwhile(checked_path, card, zoo), method=method, coef=coef, layers=layers, step=step,
        told=[{} for _ in images.get("merge", [])], images=images, wanted=wanted,
    )  # fmt: skip


@contextmanager
def sound_first(job: Job) -> Generator[None, None, None]:
    """Where something fails since the backbone's tensors are not those of its card, say that: nothing else is to blame.

    Raises:
        WrongBackbone: they are others.
    """
    try:
        yield
    except VtzooError:
        job.sound.result()
        raise


def _meanwhile(call: Callable[..., T], *args: Any) -> "Future[T]":
    """Start a call in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call, *args)
    finally:
        pool.shutdown(wait=False)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What came out: the delta, its file (still outside the zoo, and closed) and that file's digest, and the report."""

    delta: Delta
    path: Path
    digest: str
    report: dict[str, Any]


def run(job: Job, made: Plan, folder: Path) -> Made:
    """Look, search, merge, refit and measure, as far as each is wanted."""
    if job.images:
        job.sound.result()
    stage: Scene | None = None

    def on(use: str, *, heads: bool = True) -> "Scene":
        from vtzoo.stage import scene

        nonlocal stage
        stage = scene(made, job.images[use], heads=heads, model=stage.model if stage else None)
        return stage

    if job.step and job.step.looks:
        look(made, on("merge", heads=job.step.heads))
    elif job.step:
        _tell(job, folder)
    if job.wanted.search:
        made = _searched(job, made, on("search"))
    kept = kept_as(job, made)
    facts = [_fact(d, own) for d, own in zip(job.deltas, job.images.get("merge", []), strict=False)]
    merged = assembled(made, job.digests, facts, kept, job.wanted.keep)
    path = folder / "merged.safetensors"
    digest = merged.save(path, workers=WORKERS)
    job.sound.result()
    found: dict[str, Any] = {}
    if by := correcting(made.chain) or job.wanted.refit_heads:
        from vtzoo.stage import refit

        again = refit(on("refit"), made, Delta.open(path), by)
        seen = [_fact(d, own) for d, own in zip(job.deltas, job.images["refit"], strict=True)]
        again = again.with_(lineage={**again.lineage, "heads_images": seen})
        path = folder / "refitted.safetensors"
        digest, merged = again.save(path, workers=WORKERS), again
    if "test" in job.images:
        from vtzoo.stage import accuracies

        found["accuracy"] = accuracies(on("test"), made, Delta.open(path))
    if job.wanted.report:
        from vtzoo.interference import interference

        found["interference"] = interference(made.whole)
        found["backbone"] = made.deltas[0].backbone.name
        found["versions"] = ", ".join(f"{k} {v}" for k, v in merged.lineage["versions"].items())
    if kept:
        found["kept"] = {"as": str(job.wanted.keep or LORA), "cut_off": kept.error}
    return Made(delta=merged, path=path, digest=digest, report=_report(job, made) | found)


def kept_as(job: Job, made: Plan) -> Kept | None:
    """The matrices as thin ones, where that is wanted, or the merge's own form."""
    low = all(s.module.LOW_RANK for s in made.chain)
    own = next((s.module.KEEP for s in made.chain if low and hasattr(s.module, "KEEP")), "")
    asked = job.wanted.keep or own
    return low_rank(job.deltas, made.whole.shapes, made.vector, rank_asked(asked)) if asked else None


def _tell(job: Job, folder: Path) -> None:
    """Write down what each task's images tell about its own network."""
    from vtzoo import data as D
    from vtzoo import evidence as E
    from vtzoo.artifact import fold_artifact, plain_model
    from vtzoo.devices import accelerator
    from vtzoo.recipe import Recipe

    assert job.step is not None
    for i, (delta, images) in enumerate(zip(job.deltas, job.images["merge"], strict=True)):
        task = delta.task()
        folded = fold_artifact(delta, job.zoo, task.name if job.step.heads else "")
        model = plain_model(delta, folded, len(task.classes) if job.step.heads else 0)
        batches = D.loader(images, D.transforms(task.preprocess, train=False), batch_size=BATCH)
        see = getattr(E, job.step.evidence)
        found = see(model.to(accelerator(Recipe()).device), talk.track(batches, task.name, len(batches)))
        path = folder / f"{i}.safetensors"
        write(path, found, {})
        job.told[i] = TensorFile(path)


def _fact(delta: Delta, images: "Images") -> dict[str, Any]:
    return {"task": delta.task().name, "data": f"sha256:{images.digest}", "images": len(images)}


def _searched(job: Job, made: Plan, stage: "Scene") -> Plan:
    """The plan with the coefficients that do best on images."""
    from vtzoo.search import found

    facts = [_fact(d, own) for d, own in zip(job.deltas, job.images["search"], strict=True)]
    what = job.wanted.search
    assert what
    plan, trial, tries = found(made, stage, what, job.wanted.by)
    shown = ", ".join(f"{p:.3g}" for p in dict.fromkeys(trial[0]))
    talk.say(f"{job.wanted.search} by {job.wanted.by}, {tries} tried: {shown} is best ({trial[1]:.4g})")
    said = {"what": job.wanted.search, "by": job.wanted.by, "found": list(trial[0]), "tries": tries, "value": trial[1]}
    return replace(plan, searched=said | {"images": facts})


def room(merged: Delta, zoo: Zoo) -> dict[str, int]:
    """What the file will take, and what the zoo's disk has."""
    size = sum(bytes_of(merged.tensors, n) for n in merged.tensors)
    return {"size_bytes": size, "free_bytes": free_bytes(zoo.root)}


def refuse_full(sizes: Mapping[str, int]) -> None:
    """Refuse to begin what the disk can't hold.

    Raises:
        Resources: it has less room than the merge takes.
    """
    if sizes["size_bytes"] > sizes["free_bytes"]:
        raise Resources(
            f"the merge takes {sizes['size_bytes'] / 1e6:,.0f} MB, and the zoo's disk has {sizes['free_bytes'] / 1e6:,.0f}",
            "free some space (vtzoo rm, or another disk), then repeat the command",
        )


def publish(zoo: Zoo, name: str, made: Made) -> Path:
    """Put the merge into the zoo."""
    size_bytes = made.path.stat().st_size
    zoo.adopt(made.path, made.digest)
    facts = {
        "digest": made.digest,
        "size_bytes": size_bytes,
        "method": made.delta.method,
        "backbone": made.delta.backbone.name,
        "fingerprint": made.delta.backbone.fingerprint,
        "license": made.delta.backbone.license,
        "tasks": [t.name for t in made.delta.tasks],
        "metrics": {},
        "machine": told(),
    }
    zoo.put("deltas", name, facts)
    return zoo.object(made.digest)


def outline(made: Plan, refs: Sequence[str], digests: Sequence[str]) -> dict[str, Any]:
    """What the merge is made of."""
    return {
        "spec": made.spec,
        "tensors": len(made.whole.shapes),
        "parameters": sum(math.prod(s) for s in made.whole.shapes.values()),
        "parents": [
            {"ref": ref, "digest": digest[:12], "method": d.method, "coef": c, "tensors": len(names)}
            for ref, digest, d, c, names in zip(refs, digests, made.deltas, made.coef, made.whole.names, strict=True)
        ],
    }


@one_thread()
def _report(job: Job, made: Plan) -> dict[str, Any]:
    """The plan, and what was seen of the tensors after they were merged."""
    refs, found = job.refs, outline(made, job.refs, job.digests)
    for parent, norm in zip(found["parents"], made.whole.norms(), strict=True):
        parent["norm"] = norm
    if job.step and job.step.looks:
        for parent, told in zip(found["parents"], made.whole.evidence, strict=True):
            values = [float(v) for v in told.values() if not v.ndim]
            if values:
                parent["found"] = sum(values) / len(values)
    if made.searched:
        found["searched"] = {k: v for k, v in made.searched.items() if k != "images"}
    if job.wanted.explain:
        shares = made.whole.agreement()
        found["sign_agreement"] = [{"a": refs[i], "b": refs[j], "share": s} for (i, j), s in shares.items()]
    norm = math.sqrt(sum(made.squares[n] for n in sorted(made.squares)))
    if not norm:
        talk.say(f"{made.spec} leaves the backbone as it is: nothing of these deltas is in the merge but their heads")
    return {**found, "merged_norm": norm}

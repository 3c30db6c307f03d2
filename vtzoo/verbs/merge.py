"""Merge deltas of a zoo, or delta files, into one new entry of the zoo; no model is built."""

import math
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtzoo import files, talk
from vtzoo.bases import open_base
from vtzoo.delta import Delta
from vtzoo.errors import NotFoldable, Resources, UsageError
from vtzoo.evidence import HEADED, IMAGES
from vtzoo.merges._chain import evidence, steps
from vtzoo.merging import Plan, assembled, plan
from vtzoo.refs import as_path, is_path
from vtzoo.results import Merged
from vtzoo.tensors import WORKERS, TensorFile, bytes_of, one_thread, write
from vtzoo.zoo import Zoo

if TYPE_CHECKING:
    from torch import Tensor

    from vtzoo.data import Images

BATCH = 32


def merge_refs(
    *,
    refs: Sequence[str],
    method: str,
    name: str,
    coef: Sequence[float] | None = None,
    layers: str | None = None,
    data: Sequence[str] = (),
    zoo: Zoo | None = None,
    explain: bool = False,
    dry_run: bool = False,
) -> Merged:
    """Merge deltas and keep the result in the zoo.

    Args:
        refs: deltas of one backbone: names, unique prefixes, or paths.
        method: an algorithm with its knobs, such as "ties[density=0.2]".
        name: of the new delta.
        coef: one weight per ref, all 1 by default.
        layers: factors by tensor name, such as "blocks.0-5:0.3".
        data: for a merge that needs images, one task's per ref (see `vtzoo.data.open_data`): up to 256 of its train split, whose
            labels aren't used. The merge's lineage says which.
        zoo: the zoo to read and to write; by default the one that `Zoo.find` gives.
        explain: also compare the deltas by pair, which reads them once more.
        dry_run: check all that can be checked without reading tensors, report the plan, and merge nothing.

    Returns:
        The entry; its report has the parents with their coefficients and norms, how many tensors were touched, the merged
        norm, and if asked for the agreement of signs by pair.

    Raises:
        NotFound: a ref, an algorithm or data that isn't there.
        UsageError: a delta given twice, images that are missing or too many, or what `vtzoo.merge` refuses.
        Mismatch: deltas that can't be merged (see `vtzoo.merge`).
        Conflict: the name exists.
        Resources: the disk is full.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("deltas", name)
    found = [_open(ref, zoo) for ref in refs]
    digests, deltas = [d for d, _ in found], [d for _, d in found]
    _refuse_twice(refs, digests)
    base = open_base(deltas[0].backbone, zoo) if deltas else {}
    looks = evidence(steps(method))
    images = _images(refs, deltas, data, method, looks)
    seen: list[Mapping[str, Tensor]] = [{} for _ in images]  # filled when all else is checked
    made = plan(deltas, method, base=base, coef=coef, layers=layers, evidence=seen)
    talk.say(f"merging {len(deltas)} deltas, {len(made.whole.shapes)} tensors, by {made.spec}")
    sizes = _sizes(assembled(made), zoo)
    if dry_run:
        return Merged(ref=name, path="", report=_plan(made, refs, digests) | sizes)
    _refuse_full(sizes)
    with _folder(zoo) as folder:
        facts: list[dict[str, Any]] = []
        for i, own in enumerate(images):
            path = folder / f"{i}.safetensors"
            facts.append(_look(looks, deltas[i], own, zoo, path))
            seen[i] = TensorFile(path)
        path = _keep(zoo, name, assembled(made, digests, facts), folder)
        return Merged(ref=name, path=str(path), report=_report(made, refs, digests, explain=explain))


def _sizes(merged: Delta, zoo: Zoo) -> dict[str, int]:
    """What the file will take, and what the zoo's disk has."""
    size = sum(bytes_of(merged.tensors, n) for n in merged.tensors)
    return {"size_bytes": size, "free_bytes": shutil.disk_usage(_there(zoo.root)).free}


def _there(path: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _refuse_full(sizes: Mapping[str, int]) -> None:
    if sizes["size_bytes"] > sizes["free_bytes"]:
        raise Resources(
            f"the merge takes {sizes['size_bytes'] / 1e6:,.0f} MB, and the zoo's disk has {sizes['free_bytes'] / 1e6:,.0f}",
            "free some space (vtzoo rm, or another disk), then repeat the command",
        )


def _images(
    refs: Sequence[str], deltas: Sequence[Delta], data: Sequence[str], method: str, looks: str
) -> "list[Images]":
    """Open each task's images; refuse those that nobody looks at, and deltas for which it is unclear whose are meant.

    Raises:
        UsageError: why.
    """
    if not looks and data:
        raise UsageError(
            f"{method} looks at no images", "leave --data out, or choose a merge that needs them (vtzoo merges)"
        )
    for ref, delta in zip(refs, deltas, strict=True):
        if looks and len(delta.tasks) != 1:
            raise UsageError(
                f"{ref} has {len(delta.tasks)} tasks, and {method} looks at the images of one for each delta",
                "merge deltas of one task each, such as those it was made of",
            )
        if looks in HEADED and any(hasattr(p.module, "head") for p in delta.parts):
            raise NotFoldable(
                f"{ref} has a head that is not linear, and {method} looks at what a folded network predicts",
                "take a merge that looks at features alone, such as regmean",
            )
    if not data:
        return []
    from vtzoo.data import open_data

    return [open_data(d, split="train", labelled=False).limit(IMAGES) for d in data]


def _look(kind: str, delta: Delta, images: "Images", zoo: Zoo, path: Path) -> dict[str, Any]:
    """Write down what a task's images tell about its own network; which images these were."""
    from vtzoo import data as D
    from vtzoo import evidence as E
    from vtzoo.artifact import fold_artifact, plain_model
    from vtzoo.fit import accelerator
    from vtzoo.recipe import Recipe

    task = delta.task()
    head = kind in HEADED
    folded = fold_artifact(delta, zoo, task.name if head else "")
    model = plain_model(delta, folded, len(task.classes) if head else 0)
    batches = D.loader(images, D.transforms(task.preprocess, train=False), batch_size=BATCH)
    found = getattr(E, kind)(model.to(accelerator(Recipe()).device), talk.track(batches, task.name, len(batches)))
    write(path, found, {})
    return {"task": task.name, "data": f"sha256:{images.digest}", "images": len(images)}


def _keep(zoo: Zoo, name: str, merged: Delta, folder: Path) -> Path:
    """Write the merge into the zoo, and publish it."""
    path = folder / "merged.safetensors"
    digest = merged.save(path, workers=WORKERS)
    size_bytes = path.stat().st_size
    zoo.adopt(path, digest)
    facts = {
        "digest": digest,
        "size_bytes": size_bytes,
        "method": merged.method,
        "backbone": merged.backbone.name,
        "fingerprint": merged.backbone.fingerprint,
        "tasks": [t.name for t in merged.tasks],
        "metrics": {},
    }
    zoo.put("deltas", name, facts)
    return zoo.object(digest)


def _open(ref: str, zoo: Zoo) -> tuple[str, Delta]:
    """A delta and its file's digest."""
    if is_path(ref):
        path = as_path(ref)
        return files.sha256(path), Delta.open(path)
    digest = zoo.resolve(ref, "deltas").digest
    return digest, Delta.open(zoo.object(digest))


def _refuse_twice(refs: Sequence[str], digests: Sequence[str]) -> None:
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            said = f"{refs[digests.index(digest)]} and {refs[i]} are one delta"
            raise UsageError(said, "give it once, and its weight with --coef")


@contextmanager
def _folder(zoo: Zoo) -> Generator[Path, None, None]:
    """A folder on the zoo's own disk that is gone afterwards."""
    home = zoo.root / ".vtzoo"
    with files.writing(home):
        home.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=home, prefix="merge-")
    with folder as path:
        yield Path(path)


def _plan(made: Plan, refs: Sequence[str], digests: Sequence[str]) -> dict[str, Any]:
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
def _report(made: Plan, refs: Sequence[str], digests: Sequence[str], *, explain: bool) -> dict[str, Any]:
    """The plan, and what was seen of the tensors after they were merged."""
    found = _plan(made, refs, digests)
    for parent, norm in zip(found["parents"], made.whole.norms(), strict=True):
        parent["norm"] = norm
    if explain:
        shares = made.whole.agreement()
        found["sign_agreement"] = [{"a": refs[i], "b": refs[j], "share": s} for (i, j), s in shares.items()]
    norm = math.sqrt(sum(made.squares[n] for n in sorted(made.squares)))
    if not norm:
        talk.say(f"{made.spec} leaves the backbone as it is: nothing of these deltas is in the merge but their heads")
    return {**found, "merged_norm": norm}

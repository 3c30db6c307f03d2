"""Merge deltas of a zoo, or delta files, into one new entry of the zoo; no model is built."""

import math
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtzoo import files, talk
from vtzoo.bases import open_base
from vtzoo.delta import Delta
from vtzoo.errors import Resources, UsageError
from vtzoo.merging import Plan, assembled, plan
from vtzoo.refs import as_path, is_path
from vtzoo.results import Merged
from vtzoo.tensors import WORKERS, bytes_of, one_thread
from vtzoo.zoo import Zoo


def merge_refs(
    *,
    refs: Sequence[str],
    method: str,
    name: str,
    coef: Sequence[float] | None = None,
    layers: str | None = None,
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
        zoo: the zoo to read and to write; by default the one that `Zoo.find` gives.
        explain: also compare the deltas by pair, which reads them once more.
        dry_run: check all that can be checked without reading tensors, report the plan, and merge nothing.

    Returns:
        The entry; its report has the parents with their coefficients and norms, how many tensors were touched, the merged
        norm, and if asked for the agreement of signs by pair.

    Raises:
        NotFound: a ref or an algorithm that isn't there.
        UsageError: a delta given twice, or what `vtzoo.merge` refuses.
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
    made = plan(deltas, method, base=base, coef=coef, layers=layers)
    talk.say(f"merging {len(deltas)} deltas, {len(made.whole.shapes)} tensors, by {made.spec}")
    merged = assembled(made, digests)
    wanted, free = sum(bytes_of(merged.tensors, n) for n in merged.tensors), shutil.disk_usage(zoo.root).free
    if dry_run:
        return Merged(ref=name, path="", report=_plan(made, refs, digests) | {"size_bytes": wanted, "free_bytes": free})
    if wanted > free:
        raise Resources(
            f"the merge takes {wanted / 1e6:,.0f} MB, and the zoo's disk has {free / 1e6:,.0f}",
            "free some space (vtzoo rm, or another disk), then repeat the command",
        )
    path = _keep(zoo, name, merged)
    return Merged(ref=name, path=str(path), report=_report(made, refs, digests, explain=explain))


def _keep(zoo: Zoo, name: str, merged: Delta) -> Path:
    """Write the merge into the zoo, and publish it."""
    with _folder(zoo) as folder:
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
    return {**found, "merged_norm": math.sqrt(sum(made.squares[n] for n in sorted(made.squares)))}

"""Run an entry's recorded command again, and compare what comes out with what is there.

It runs in a scratch zoo, under the entry's own name (a task is called by it) and with its own parents, so the zoo itself stays as
it is until the result is kept.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtzoo import talk
from vtzoo.again import Line, given_again, missing_data, parents_of
from vtzoo.apart import apart, whole
from vtzoo.artifact import Artifact, go_live, open_ref
from vtzoo.delta import HEAD
from vtzoo.errors import Interrupted, NotFound, UsageError
from vtzoo.lineage import Origin, images, of_entry, versions
from vtzoo.machine import told
from vtzoo.refs import Entry, check_name
from vtzoo.results import Reproduced
from vtzoo.scratch import scratch
from vtzoo.spec import as_map, one_line
from vtzoo.zoo import Zoo

TOLERANCE = 0.01
"""How far a share such as top-1 may be off, and the tensors' relative distance where nothing was measured."""
SHARES = ("top1", "top5", "balanced_accuracy", "map", "micro_f1", "macro_f1", "retention", "agreement")
Run = Callable[[Line, Mapping[str, Any], Zoo, Sequence[str]], None]


def reproduce(
    *, ref: str, line: Line, run: Run, data: Sequence[str] = (), tolerance: float = TOLERANCE, keep: str | None = None,
    zoo: Zoo | None = None,
) -> Reproduced:  # fmt: skip
    """Make an entry once more and say how far the result is from it.

    Args:
        ref: a delta or a model of the zoo.
        line: its recorded command, as the command line parsed it.
        run: runs it, with these values, in this zoo, on images of these digests alone.
        data: where the images are now, as often and in the order in which the command names them.
        tolerance: how far metrics may be off (shares: 0.01 is one in a hundred); without metrics, the tensors' distance.
        keep: also keep the result, under this name.
        zoo: where the entry is.

    Returns:
        `within`: whether it is the same file or within the tolerance; `report`: digests, metrics and tensors side by side, and the
        versions that differ.

    Raises:
        UsageError: the command makes nothing that could be compared, or `data` is given another number of times.
        NotFound: what it was made from is no longer in the zoo.
        Mismatch: the images are not those that it was made from.
        Conflict: `keep` exists.
    """
    zoo = zoo or Zoo.find()
    entry = zoo.resolve(ref)
    before = of_entry(zoo, entry)
    if keep is not None:
        zoo.check_free(entry.section, check_name(keep))
    awaited = [i["data"] for i in images(before.lineage)]
    talk.say(f"runs again: {one_line(line.command)}")
    lent = parents_of(zoo, before, line)
    with tempfile.TemporaryDirectory() as outside, scratch(zoo, lent) as other:
        values = given_again(zoo, before, line, data, Path(outside))
        _run(run, line, values, other, awaited, moved=bool(data))
        made = _made(other, entry, lent)
        after = of_entry(other, made)
        report = _report(
            before, after, open_ref(entry.name, zoo, exports=True), open_ref(made.name, other, exports=True)
        )
        within = report["same_digest"] or _within(report, tolerance)
        kept = _kept(zoo, other, made, keep) if keep is not None else ""
    report = {"command": line.command, "tolerance": tolerance, **report}
    return Reproduced(ref=kept, path=str(zoo.object(made.digest)) if kept else "", within=within, report=report)


def _run(run: Run, line: Line, values: Mapping[str, Any], other: Zoo, awaited: Sequence[str], *, moved: bool) -> None:
    """Run it; what it would say of going on, or of images that aren't where they were, is said as it holds here."""
    try:
        run(line, values, other, awaited)
    except Interrupted as error:
        raise Interrupted("interrupted; nothing was kept", "vtzoo reproduce starts anew") from error
    except NotFound as error:
        if moved or not missing_data(line):
            raise
        raise NotFound(error.message, "say where its images are now: --data DATA") from error


def _made(other: Zoo, entry: Entry, lent: Sequence[Entry]) -> Entry:
    """What the command made: the one entry that wasn't there before.

    Raises:
        UsageError: nothing of that kind.
    """
    known = {(e.section, e.name) for e in lent}
    found = [e for e in other.entries(entry.section) if not e.builtin and (e.section, e.name) not in known]
    if not found:
        said = f"the recorded command makes no {entry.section[:-1]}, and '{entry.name}' is one"
        raise UsageError(said, f"see how it was made: vtzoo show {entry.name}")
    return found[0]


def _kept(zoo: Zoo, other: Zoo, made: Entry, name: str) -> str:
    """Take the result over into the zoo."""
    digests = [zoo.add_object(other.object(d)) for d in sorted(made.objects)]
    try:
        return zoo.put(made.section, name, made.facts).name
    except BaseException:
        zoo.discard(digests)
        raise


def _report(before: Origin, after: Origin, old: Artifact, new: Artifact) -> dict[str, Any]:
    """Both side by side."""
    found: dict[str, Any] = {
        "same_digest": before.digest == after.digest, "same_tensors": before.digest == after.digest, "digest": before.digest, "again": after.digest,
        "versions": _changed(before), "metrics": _metrics(before, after),
    }  # fmt: skip
    if found["same_digest"]:
        return found
    if old.exported is not None:
        return found | {"outputs": _outputs(old, new)}
    seen = apart(old, new)
    heads = [r["distance"] for r in seen.rows if r["tensor"].startswith(HEAD)]
    told = {**whole(seen.rows), "heads": max(heads, default=0.0)} if seen.rows else None
    same = bool(seen.rows) and not any(seen.only) and all(r["largest"] == 0 for r in seen.rows)
    return found | {"by": seen.by, "because": seen.because, "tensors": told, "same_tensors": same}


def _outputs(old: Artifact, new: Artifact) -> dict[str, float]:
    """How far two exported files' outputs are from each other on random pictures, relative to the largest."""
    import torch

    from vtzoo.onnx.verify import random_pictures

    task = old.tasks[0].name if old.tasks else None
    one, two = (go_live(a, task) for a in (old, new))
    with torch.inference_mode():
        pairs = [(one.model(x).double(), two.model(x).double()) for x in random_pictures(one.preprocess)]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return {"distance": max(float((a - b).abs().max()) for a, b in pairs) / max(largest, 1e-30)}


def _metrics(before: Origin, after: Origin) -> list[dict[str, Any]]:
    """The numbers that both have."""
    old, new = (_numbers("", as_map(o.said.get("metrics")) or as_map(o.facts.get("metrics"))) for o in (before, after))
    return [
        {"metric": k, "recorded": v, "again": new[k], "difference": abs(new[k] - v)} for k, v in old.items() if k in new
    ]


def _numbers(prefix: str, found: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(f"{prefix}{key}.", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _within(report: Mapping[str, Any], tolerance: float) -> bool:
    """Whether shares are near enough, or where there are none the tensors or outputs."""
    if report["same_tensors"]:
        return True
    shares = [m["difference"] for m in report["metrics"] if m["metric"].rpartition(".")[2] in SHARES]
    if shares:
        return max(shares) <= tolerance
    seen = report.get("outputs") or report.get("tensors")
    return bool(seen) and max(seen["distance"], seen.get("heads", 0.0)) <= tolerance


def _changed(before: Origin) -> list[dict[str, str]]:
    """What of the recorded versions, and of the machine, is another one now."""
    recorded = {k: str(v) for k, v in as_map(before.lineage.get("versions")).items()}
    now = {k: v for k, v in versions().items() if k in recorded}
    if machine := before.facts.get("machine"):
        recorded, now = {**recorded, "machine": machine}, {**now, "machine": told()}
    return [{"what": k, "recorded": recorded[k], "now": v} for k, v in now.items() if recorded[k] != v]

"""What a merge is given: deltas by their refs, folded models as deltas, each task's images, and what is wanted beside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtzoo import files
from vtzoo.delta import Delta, head_parts
from vtzoo.errors import NotFoldable, UsageError, did_you_mean
from vtzoo.heads import layer_of, linear_head
from vtzoo.keeping import rank_asked
from vtzoo.merges._chain import Step, correcting, curious
from vtzoo.refs import as_path, is_path
from vtzoo.zoo import Zoo

if TYPE_CHECKING:
    from vtzoo._images import Images

SEARCH_IMAGES = 64
"""How many images of each task a search looks at."""
REFIT_IMAGES = 256
TEST_IMAGES = 500
Search = Literal["scale", "layers", "coef", ""]
Refit = Literal["", "expert", "labels"]
By = Literal["agreement", "entropy", "accuracy"]
CHOICES = {
    "search": ("scale", "layers", "coef"),
    "by": ("agreement", "entropy", "accuracy"),
    "refit_heads": ("expert", "labels"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is wanted beside the merge itself."""

    search: Search = ""
    by: By = "agreement"
    refit_heads: Refit = ""
    keep: str = ""
    report: Path | None = None
    explain: bool = False


def check_wanted(wanted: Wanted) -> None:
    """Refuse what is no choice, before anything is opened.

    Raises:
        UsageError: which, and what there is.
        Conflict: the report's file exists.
    """
    for what, known in CHOICES.items():
        if (value := getattr(wanted, what)) and value not in known:
            raise UsageError(f"--{what.replace('_', '-')} {value} is not known", did_you_mean(value, known))
    if wanted.keep:
        rank_asked(wanted.keep)
    if wanted.report is not None:
        from vtzoo.page import ready

        ready(wanted.report)


def refuse_contrary(chain: Sequence[Step], wanted: Wanted) -> None:
    """Refuse what a step leaves no room for: what needs one network where it keeps one for each task, and heads fitted twice.

    Raises:
        UsageError: why.
    """
    if (fit := correcting(chain)) and wanted.refit_heads:
        raise UsageError(f"{fit.part.name} and --refit-heads both fit the heads", "leave one out")
    name = next((s.part.name for s in chain if s.masks), "")
    if name and wanted.search:
        raise UsageError(
            f"{name} keeps a network of its own for each task, and a search looks at one", "leave --search out"
        )
    if name and wanted.keep:
        raise UsageError(f"{name} keeps a bit for every entry, and a LoRA has none", "leave --keep out")


def open_deltas(refs: Sequence[str], zoo: Zoo) -> list[tuple[str, Delta]]:
    """Deltas, and folded models as deltas, each with its file's digest."""
    found = [None if _folded(ref, zoo) else open_delta(ref, zoo) for ref in refs]
    like = next((f[1] for f in found if f), None)
    return [f or _open_folded(ref, zoo, like) for ref, f in zip(refs, found, strict=True)]


def open_delta(ref: str, zoo: Zoo) -> tuple[str, Delta]:
    """A delta and its file's digest."""
    if is_path(ref):
        path = as_path(ref)
        return files.sha256(path), Delta.open(path)
    digest = zoo.resolve(ref, "deltas").digest
    return digest, Delta.open(zoo.object(digest))


def _folded(ref: str, zoo: Zoo) -> bool:
    """Whether a ref means a plain model, by its files or its entry alone."""
    if is_path(ref):
        return Path(ref).expanduser().is_dir()
    names = {e.name for e in zoo.entries("models")}
    return ref.partition("@")[0] in names and ref.partition("@")[0] not in {e.name for e in zoo.entries("deltas")}


def _open_folded(ref: str, zoo: Zoo, like: Delta | None) -> tuple[str, Delta]:
    from vtzoo.artifact import open_ref
    from vtzoo.checkpoint import folded_delta

    artifact = open_ref(ref, zoo)
    assert artifact.files is not None
    return artifact.digest, folded_delta(artifact.files, zoo, like)


def refuse_twice(refs: Sequence[str], digests: Sequence[str]) -> None:
    """Refuse a delta that is given two times.

    Raises:
        UsageError: which.
    """
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            said = f"{refs[digests.index(digest)]} and {refs[i]} are one delta"
            raise UsageError(said, "give it once, and its weight with --coef")


def images_of(
    refs: Sequence[str],
    deltas: Sequence[Delta],
    data: Sequence[str],
    chain: Sequence[Step],
    method: str,
    wanted: Wanted,
) -> "dict[str, list[Images]]":
    """Open each task's images for each use of them; refuse those that nobody looks at.

    Raises:
        UsageError: why.
        NotFoldable: a head that is no linear layer, and is looked at.
    """
    step, fit = curious(chain), correcting(chain)
    asked = {"--search": bool(wanted.search), "--refit-heads": bool(wanted.refit_heads)}
    users = [u for u, is_asked in asked.items() if is_asked] + ([fit.part.name] if fit else [])
    if step:
        _refuse_unclear(refs, deltas, step)
    if users:
        _refuse_other_heads(refs, deltas, layer_of if fit else linear_head)
    if data and not (step or users or wanted.report):
        raise UsageError(
            f"{method} looks at no images", "leave --data out, or choose a merge that needs them (vtzoo merges)"
        )
    if not data:
        if users:
            raise UsageError(
                f"{users[0]} needs images of every task",
                "give --data once per delta, in the same order, as: --data vtzoo:fashion --data ./birds",
            )
        return {}
    from vtzoo.stage import opened

    found: dict[str, list[Images]] = {}
    if step:
        labelled = step.needs == "labels"
        found["merge"] = opened(
            data, deltas, split="val" if labelled else "train", labelled=labelled, limit=step.images
        )
    if wanted.search:
        labelled = wanted.by == "accuracy"
        found["search"] = opened(
            data, deltas, split="val" if labelled else "train", labelled=labelled, limit=SEARCH_IMAGES
        )
    if wanted.refit_heads or fit:
        found["refit"] = opened(
            data, deltas, split="train", labelled=wanted.refit_heads == "labels", limit=REFIT_IMAGES
        )
    if wanted.report:
        found["test"] = opened(data, deltas, split="test", labelled=True, limit=TEST_IMAGES)
    return found


def _refuse_other_heads(refs: Sequence[str], deltas: Sequence[Delta], check: Callable[..., Any]) -> None:
    """Refuse heads that can't be looked at."""
    for ref, delta in zip(refs, deltas, strict=True):
        for task in delta.tasks:
            check(delta.head(task.name), ref)


def _refuse_unclear(refs: Sequence[str], deltas: Sequence[Delta], step: Step) -> None:
    """Refuse deltas for which it is unclear whose images are meant, or whose predictions can't be looked at."""
    for ref, delta in zip(refs, deltas, strict=True):
        if len(delta.tasks) != 1:
            raise UsageError(
                f"{ref} has {len(delta.tasks)} tasks, and {step.part.name} looks at the images of one for each delta",
                "merge deltas of one task each, such as those it was made of",
            )
        if step.heads and head_parts(delta):
            raise NotFoldable(
                f"{ref} has a head that is not linear, and {step.part.name} looks at what a folded network predicts",
                "take a merge that looks at features alone, such as regmean",
            )

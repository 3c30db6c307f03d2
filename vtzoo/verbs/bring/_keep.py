"""What every import does around its format: the backbone before, labels, a check by running it, and the entry after."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, probe, survey
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card
from vtzoo.delta import stored
from vtzoo.errors import Corrupt, NotFound, ShapeMismatch, WrongBackbone
from vtzoo.interop._parts import Origin, Piece, assemble
from vtzoo.live import attach
from vtzoo.refs import check_name
from vtzoo.results import Result
from vtzoo.spec import BackboneCard, Preprocess, Task, check_labels
from vtzoo.tied import aliases, tied
from vtzoo.zoo import Zoo


def bare(backbone: str, zoo: Zoo) -> tuple[nn.Module, BackboneCard, Anatomy]:
    """The backbone without a head."""
    model = build_card(resolved_card(backbone, zoo), zoo=zoo)
    card: BackboneCard = getattr(model, "vtzoo_card")  # noqa: B009 - set by build
    return model, card, survey(model)


def keep(
    zoo: Zoo,
    name: str,
    pieces: Sequence[Piece],
    head: Mapping[str, Tensor],
    card: BackboneCard,
    *,
    task: str | None,
    classes: Path | None,
    beside: Mapping[str, Any],
    lineage: Mapping[str, Any],
) -> Result:
    """Put the pieces together, run them on the backbone once, and keep the delta."""
    for key in ("metrics", "recipe"):
        if not isinstance(beside.get(key) or {}, Mapping):
            raise Corrupt(f"vtzoo.json garbles its {key}", "fetch it again, or take vtzoo.json away")
    own = _task(name, head, card, task, classes, beside) if head else None
    facts = {k: beside.get(k) or {} for k in ("metrics", "recipe")}
    made = assemble(pieces, head, Origin(card=card, task=own, lineage=lineage, **facts))
    model = build_card(card, zoo=zoo, num_classes=len(own.classes) if own else 0)
    shared = aliases(model)
    delta = made.with_(parts=tuple(replace(p, sites=tied(p.sites, shared)) for p in made.parts))
    attach(model, delta)
    if not bool(torch.isfinite(probe(model)).all()):
        raise Corrupt("with these tensors the network gives NaN or infinity", "fetch or make the file again")
    digest, size = stored(delta, zoo)
    zoo.put(
        "deltas", name,
        {
            "digest": digest, "size_bytes": size, "method": delta.method, "backbone": card.name, "fingerprint": card.fingerprint, "license": card.license,
            "tasks": [t.name for t in delta.tasks], "metrics": {},
        },
    )  # fmt: skip
    return Result(ref=name, path=str(zoo.object(digest)))


def check_beside(beside: Mapping[str, Any], card: BackboneCard) -> None:
    """Refuse a file that says it was made for other weights."""
    said = beside.get("backbone") or {}
    if not isinstance(said, Mapping):
        raise Corrupt("vtzoo.json garbles its backbone", "take vtzoo.json away, if you know that this is the backbone")
    if said and said.get("fingerprint") != card.fingerprint:
        raise WrongBackbone(
            f"vtzoo.json says it was made for {said.get('name')} ({str(said.get('fingerprint'))[:19]}…), {card.name or card.arch} is "
            f"{card.fingerprint[:19]}…",
            "name its own backbone with --backbone, or take vtzoo.json away if you know better",
        )


def _task(
    name: str, head: Mapping[str, Tensor], card: BackboneCard, task: str | None, path: Path | None, beside: Mapping[str, Any]
) -> Task:  # fmt: skip
    """Whose head it is: labels from vtzoo.json, else from the file given, else numbers."""
    rows = next((int(t.shape[0]) for n, t in head.items() if n.endswith("weight")), 0)
    try:
        said = next(iter(beside.get("tasks") or ()), None)
        known = Task.of(said) if said else None
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            f"vtzoo.json garbles its task: {error}", "take vtzoo.json away, and pass --classes FILE"
        ) from error
    labels = _labels(path) if path else known.classes if known else tuple(map(str, range(rows)))
    if len(labels) != rows:
        raise ShapeMismatch(
            f"{path or 'vtzoo.json'} has {len(labels)} classes, the head {rows}",
            "name one class a line, in the head's order",
        )
    check_labels(labels)
    called = check_name(task or (known.name if known else name.rpartition("/")[0] or name))
    preprocess: Preprocess = known.preprocess if known else card.preprocess
    return Task(name=called, classes=labels, preprocess=preprocess, multilabel=bool(known and known.multilabel))


def _labels(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise NotFound(f"no file {path}", "give a text file with one class a line")
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())

"""Ship many tasks as one ONNX file, each image's task given beside it; verified with onnxruntime before the file appears."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import talk
from vtzoo.artifact import Artifact, Live, go_live, open_ref, simplest
from vtzoo.backbone import build_card
from vtzoo.classifier import head_names
from vtzoo.errors import Mismatch, NotExportable, UsageError, WrongBackbone
from vtzoo.files import atomic_write
from vtzoo.installed import set_head
from vtzoo.masks import is_masked
from vtzoo.mixing import Member, Mixed, share
from vtzoo.onnx import mixtures
from vtzoo.onnx.convert import OPSET, convert
from vtzoo.onnx.describe import PAD, Description, written
from vtzoo.onnx.gallery import Gallery, gallery
from vtzoo.onnx.mixtures import Mixture
from vtzoo.onnx.pixels import embed
from vtzoo.onnx.run import Runtime, latencies, session
from vtzoo.onnx.seal import seal
from vtzoo.onnx.tasks import convert_tasks
from vtzoo.onnx.verify import TOLERANCES, Difference
from vtzoo.results import Exported
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.verbs.export._origin import keep, origin, ready
from vtzoo.zoo import Zoo


@dataclass(frozen=True, slots=True)
class Part:
    """What one ref brings."""

    artifact: Artifact
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Net:
    """The network of all tasks, and where each task's rows have modules to themselves; by task's number what its own gives for noise and for real images."""

    mixed: Mixed
    card: BackboneCard
    noise: dict[int, Tensor]
    real: dict[int, Tensor]
    whole: str


@dataclass(frozen=True, slots=True)
class Shown:
    """What is looked at to verify: noise, and real images of some tasks or all."""

    noise: Sequence[Mixture]
    real: Gallery


def export_tasks(
    *, refs: Sequence[str], out: Path, opset: int | None = None, tolerance: float | None = None, embed_preprocess: bool = False,
    compare: bool = False, data: str | Mapping[str, str] | None = None, zoo: Zoo | None = None, name: str | None = None,
) -> Exported:  # fmt: skip
    """Export deltas of one backbone, a merge or a student, with all their tasks.

    Args:
        refs: several deltas, merges among them; or one merge or student.
        out: the file; it appears only when batches of mixed tasks give what each task's own network gives.
        opset: ONNX operator set, 17 to 23; 18 unless given.
        tolerance: the largest allowed difference, relative to the task's largest output; 1e-3 unless given.
        embed_preprocess: take uint8 pictures [n, h, w, 3] and normalise in the graph.
        compare: also translate each task by itself, and tell what these files would take.
        data: real images to verify with, too: by task, or the same for all tasks; their labels don't matter.
        zoo: where to look.
        name: also keep the file in the zoo.

    Returns:
        `report`: one row a task, with its largest difference, what of the network it has to itself and, of real images, how many there were and how often
        the file says the same as the task's own network; size, and time of a mixed batch.

    Raises:
        NotFound: no such ref, or images of a task that isn't there.
        UsageError: fewer than two tasks, one of them twice, or the onnx extra is not installed.
        WrongBackbone: the deltas are not of one backbone.
        Mismatch: they look at images in different ways.
        NotExportable: a merge with a network for each task, or the exporter can't translate the network, and why.
        ExportMismatch: outputs differ by more than the tolerance.
        Conflict: the file exists.
    """
    zoo, out = zoo or Zoo.find(), Path(out)
    opset, allowed = OPSET if opset is None else opset, TOLERANCES["float32"] if tolerance is None else tolerance
    ready(out, opset)
    if name:
        zoo.check_free("models", name)
    parts = [_opened(ref, zoo) for ref in refs]
    shape = _together(parts)
    tasks = [t for p in parts for t in p.tasks]
    shown = Shown(mixtures.mixtures(shape, len(tasks)), gallery(data or {}, tasks, shape))
    net = _network(parts, shown, zoo)
    graph = convert_tasks(net.mixed, shape.input_size, len(tasks), opset)
    if embed_preprocess:
        embed(graph, shape)
    content = seal(graph, written(_description(parts, net, shape, embedded=embed_preprocess)))
    report = {
        "precision": "float32", "opset": opset, **_verified(parts, net, content, shown, allowed, embedded=embed_preprocess),
        **(_singles(parts, shown.noise[-1], opset, embedded=embed_preprocess) if compare else {}),
    }  # fmt: skip
    with atomic_write(out) as file:
        file.write(content)
        if name:
            parents = [p.artifact.digest for p in parts]
            keep(zoo, name, {".onnx": content}, net.card, [t.name for t in tasks], parents, report)
    talk.say(f"exported {out}: largest relative difference {report['max_rel']:.1e}")
    return Exported(ref=name or parts[0].artifact.ref, path=str(out), report=report)


def _opened(ref: str, zoo: Zoo) -> Part:
    artifact = open_ref(ref, zoo)
    if not artifact.tasks:
        raise UsageError(f"'{artifact.ref}' has no task's head", "choose a delta or a model with classes")
    if artifact.delta is not None and is_masked(artifact.delta):
        raise NotExportable(
            f"'{artifact.ref}' ({artifact.delta.method}) keeps a whole network for each task, so one file would be as large as all",
            "ship the deltas it was made from with --with, or export it with --task",
        )
    return Part(artifact, artifact.tasks)


def _together(parts: Sequence[Part]) -> Preprocess:
    """Refuse what can't be one network; gives how all look at images."""
    tasks = [t for p in parts for t in p.tasks]
    if twice := [n for n, count in Counter(t.name for t in tasks).items() if count > 1]:
        raise UsageError(f"the task '{twice[0]}' is there twice", "leave one out, since task_id says which is meant")
    if len(tasks) == 1:
        raise UsageError(f"'{parts[0].artifact.ref}' has one task", "add others: --with REF")
    first, others = parts[0].artifact, [p.artifact for p in parts[1:]]
    if others and (plain := next((a for a in (first, *others) if a.delta is None), None)):
        raise UsageError(
            f"'{plain.ref}' is no delta, and has no backbone in common with others", "export it without --with"
        )
    for other in others:
        assert first.delta is not None
        assert other.delta is not None
        one, two = first.delta.backbone, other.delta.backbone
        if one.fingerprint != two.fingerprint:
            raise WrongBackbone(
                f"'{other.ref}' was made for {two.name} ({two.fingerprint[:19]}…), '{first.ref}' for {one.name} ({one.fingerprint[:19]}…)",
                "give deltas of one backbone",
            )
    looks = tasks[0].preprocess
    if odd := next((t for t in tasks if t.preprocess != looks), None):
        raise Mismatch(
            f"'{odd.name}' looks at images otherwise than '{tasks[0].name}': {_apart(odd.preprocess, looks)}",
            "train both at one size and from one backbone's preprocessing",
        )
    return looks


def _apart(one: Preprocess, other: Preprocess) -> str:
    fields = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    name = next(f for f in fields if getattr(one, f) != getattr(other, f))
    return f"{name} {getattr(one, name)}, not {getattr(other, name)}"


def _network(parts: Sequence[Part], shown: Shown, zoo: Zoo) -> Net:
    """Build every task's own network, keep what it gives, and put all together."""
    members, noise, real = list[Member](), dict[int, Tensor](), dict[int, Tensor]()
    first, whole = parts[0].artifact.delta, ""
    lead = build_card(first.backbone, zoo=zoo, num_classes=2) if first is not None and len(parts) > 1 else None
    card = BackboneCard(name="", arch="")
    for part in parts:
        model, heads = None, list[dict[str, nn.Module]]()
        for live in _each(part):
            model, card = model or live.model, live.card
            task = len(noise)
            noise[task] = mixtures.alone(live.model, mixtures.of(shown.noise, task))
            if task in shown.real.looks:
                real[task] = mixtures.alone(live.model, shown.real.of(task))
            heads.append({n: live.model.get_submodule(n) for n in head_names(live.model)})
        assert model is not None
        if lead is not None:
            share(lead, model)  # at once, so that the backbone is not held for each
        members.append(Member(model, heads))
    if lead is None:
        lead, whole = _trunk(parts[0], members[0].model)
        members = [Member(lead, members[0].heads)]
    return Net(Mixed(lead, members, PAD), card, noise, real, whole)


def _each(part: Part) -> Iterator[Live]:
    """A ref's network with each task's head in turn; of a delta it is one network."""
    first, *others = part.tasks
    live = go_live(part.artifact, first.name)
    yield live
    for task in others:
        if part.artifact.delta is not None:
            set_head(live.model, part.artifact.delta, task.name)
            yield live
        else:
            yield go_live(part.artifact, task.name)


def _trunk(part: Part, attached: nn.Module) -> tuple[nn.Module, str]:
    """The one network of several tasks, folded where it folds; and which it is."""
    if part.artifact.delta is None:
        return attached, "shared"
    live, why = simplest(part.artifact, part.tasks[0].name)
    if why:
        talk.say(f"exporting it attached: {why}")
    return (attached, "shared, attached") if why else (live.model, "shared, folded")


def _verified(
    parts: Sequence[Part], net: Net, content: bytes, shown: Shown, allowed: float, *, embedded: bool
) -> dict[str, Any]:
    """Run the file on mixed batches, refuse it or report."""
    tasks = [t for p in parts for t in p.tasks]
    runtime = Runtime(session(content), tasks[0].preprocess, embedded=embedded)
    noise, real = mixtures.together(runtime, shown.noise, net.noise), dict[int, Difference]()
    if net.real:
        real = mixtures.together(runtime, shown.real, net.real)
    for found in (noise, real):
        mixtures.judge(found, tasks, allowed, "try another --opset, or pass a larger --tolerance knowingly")
    last, rows = shown.noise[-1], mixtures.rows(noise, real, tasks, _ways(parts, net))
    (time,) = latencies(runtime.bare(last.images, last.tasks))
    return {
        "tolerance": allowed, "verified_on": "random pictures" + (f" and {len(shown.real)} images" if real else ""), "tasks": rows,
        "max_abs": max(r["max_abs"] for r in rows), "max_rel": max(r["max_rel"] for r in rows), "size_bytes": len(content),
        "batch": len(last.tasks), "onnxruntime_ms": time, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _ways(parts: Sequence[Part], net: Net) -> list[dict[str, Any]]:
    """Of each task its ref, its method, and what of the network it has to itself."""
    said = net.mixed.apart or [()]
    return [
        {
            "ref": p.artifact.ref, "method": p.artifact.delta.method if p.artifact.delta else "",
            "apart": net.whole or _own(own),
        }
        for p, own in zip(parts, said, strict=True) for _ in p.tasks
    ]  # fmt: skip


def _own(modules: Sequence[str]) -> str:
    if "" in modules:
        return "the whole network"
    return f"{len(modules)} module{'s' * (len(modules) > 1)}" if modules else "nothing"


def _description(parts: Sequence[Part], net: Net, shape: Preprocess, *, embedded: bool) -> Description:
    every: list[tuple[Task, dict[str, Any]]] = []
    common: dict[str, Any] = {}
    for part in parts:
        facts = origin(part.artifact, net.card, precision="float32", folded="folded" in net.whole)
        every += [(t, {k: facts[k] for k in ("ref", "digest", "method", "parents", "license")}) for t in part.tasks]
        common = {k: facts[k] for k in ("backbone", "fingerprint", "license", "precision", "folded", "versions")}
    return Description(task=None, preprocess=shape, embedded=embedded, tasks=tuple(every), facts=common)


def _singles(parts: Sequence[Part], batch: Mixture, opset: int, *, embedded: bool) -> dict[str, Any]:
    """What a file for each task would take: bytes, and the time that their sessions need for the same images, each for its own."""
    runs, size = list[Callable[[], Any]](), 0
    each = [(part, task) for part in parts for task in part.tasks]
    for number, (part, task) in enumerate(each):
        live, why = simplest(part.artifact, task.name)
        graph = convert(live.model, live.preprocess.input_size, opset=opset)
        if embedded:
            embed(graph, live.preprocess)
        facts = origin(part.artifact, live.card, precision="float32", folded=not why)
        content = seal(graph, written(Description(task=task, preprocess=live.preprocess, embedded=embedded, facts=facts)))  # fmt: skip
        size += len(content)
        own = Runtime(session(content), live.preprocess, embedded=embedded)
        runs.append(own.bare(batch.images[batch.tasks == number]))
    (time,) = latencies(lambda: [run() for run in runs])
    return {"single_files_size_bytes": size, "single_files_onnxruntime_ms": time}

"""What merges, searches and reports look at: each task's images, and the plain network that takes on merged weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import data as D
from vtzoo import talk
from vtzoo._images import Images
from vtzoo._layout import Split
from vtzoo.artifact import plain_model
from vtzoo.delta import HEAD, Delta, Part, head_parts, with_heads
from vtzoo.devices import accelerator
from vtzoo.errors import Mismatch, UsageError
from vtzoo.folding import fold
from vtzoo.heads import classifier, corrected, linear_head, refitted, ridge
from vtzoo.masks import is_masked
from vtzoo.merges._chain import Step
from vtzoo.merges._scene import Scene
from vtzoo.merging import Plan
from vtzoo.methods._protocol import head as build_head
from vtzoo.methods._protocol import resized
from vtzoo.recipe import Recipe
from vtzoo.tensors import fill, one_thread, prefixed, shape_of

BATCH = 64
Refit = Literal["expert", "labels"]
MLP = "mlp-head"


def opened(data: Sequence[str], deltas: Sequence[Delta], *, split: Split, labelled: bool, limit: int) -> list[Images]:
    """Up to `limit` images of each delta's task.

    Args:
        data: one for each delta, in the same order (see `vtzoo.data.open_data`).
        deltas: of one task each.
        split: which part.
        labelled: whether classes are looked at; they must be the task's own then.
        limit: how many images.

    Raises:
        UsageError: not one for each delta, or a delta of several tasks or none.
        Mismatch: classes that the task doesn't have.
    """
    if len(data) != len(deltas):
        raise UsageError(
            f"{len(data)} times --data for {len(deltas)} deltas",
            "give it once per delta, in the same order, as: --data vtzoo:fashion --data ./birds",
        )
    if not all(data):
        raise UsageError("an empty --data names no images", "give a folder, or vtzoo:NAME")
    return [_one(d, delta, split, labelled=labelled, limit=limit) for d, delta in zip(data, deltas, strict=True)]


def _one(data: str, delta: Delta, split: Split, *, labelled: bool, limit: int) -> Images:
    if len(delta.tasks) != 1:
        names = ", ".join(t.name for t in delta.tasks) or "none"
        raise UsageError(
            f"a delta with the tasks {names} has no one task whose images {data} could be",
            "merge deltas of one task each",
        )
    task = delta.tasks[0]
    if task.multilabel:
        raise UsageError(
            f"the images of '{task.name}' have several labels each, and merges compare one class",
            "choose a merge without --data",
        )
    images = D.open_data(data, split=split, labelled=labelled)
    if labelled:
        if spare := sorted(set(images.classes) - set(task.classes)):
            raise Mismatch(
                f"{data} has the class {spare[0]}, which the task '{task.name}' doesn't", "give the task's own data"
            )
        images = images.aligned(task.classes)
    return images.limit(limit)


def scene(plan: Plan, images: Sequence[Images], *, heads: bool, model: nn.Module | None = None) -> Scene:
    """A plain network, and all images in memory.

    Args:
        plan: of the merge.
        images: one task's for each delta.
        heads: whether the tasks' classifiers are looked at.
        model: of an earlier scene, to be used again.

    Raises:
        NotFoldable: a head is not one linear layer, and it is looked at.
    """
    found = [linear_head(d.head(d.tasks[0].name), d.tasks[0].name) for d in plan.deltas] if heads else []
    model = model or plain_model(plan.deltas[0], plan.ground, 0).to(accelerator(Recipe()).device)
    seen = [_tensors(own, d) for own, d in zip(images, plan.deltas, strict=True)]
    return Scene(
        model=model,
        whole=plan.whole,
        tensor=plan.tensor,
        told=[e if isinstance(e, dict) else {} for e in plan.whole.evidence],
        heads=found,
        images=[x for x, _ in seen],
        labels=[y for _, y in seen],
    )


def load_merged(stage: Scene, plan: Plan, merged: Delta, task: int) -> None:
    """Give the network what was merged, or what one task uses of it."""
    name = plan.deltas[task].tasks[0].name
    made = fold(plan.ground, merged, task=name if is_masked(merged) else "", check=False)
    stage.load(lambda n: made[n])


def answers(stage: Scene) -> list[Tensor]:
    """What each task's own delta says of its images, as logits [n, classes]."""
    found: list[Tensor] = []
    for task in range(len(stage.images)):
        stage.load_expert(task)
        found.append(stage.logits(task, stage.features(task)))
    return found


def refit(stage: Scene, plan: Plan, merged: Delta, by: Refit | Step, told: Sequence[Tensor] | None = None) -> Delta:
    """The merge with heads fitted to its own features.

    Args:
        stage: has the images.
        plan: of the merge.
        merged: what came out.
        by: `expert` fits classifiers to what the task's own delta says, in closed form and staying near to its head (see `vtzoo.heads`), and
            needs no labels; `labels` starts anew; a step that corrects heads comes in front of each task's own.
        told: `answers` of this stage, where they are known already.
    """
    if isinstance(by, Step):
        return _corrected(stage, plan, merged, by)
    heads: dict[str, Tensor] = {}
    wanted = stage.labels if by == "labels" else told or answers(stage)
    for task, delta in enumerate(plan.deltas):
        name, weight = delta.tasks[0].name, stage.heads[task][0]
        if not task or is_masked(merged):
            load_merged(stage, plan, merged, task)
        seen, targets = stage.features(task), wanted[task]
        fitted = ridge(seen, targets, weight) if by == "expert" else classifier(seen, targets, len(weight))
        heads |= {f"{HEAD}{name}/{n}": t for n, t in refitted(dict(merged.head(name)), *fitted).items()}
    return _with_heads(merged, heads, f"refitted by {by}")


def _corrected(stage: Scene, plan: Plan, merged: Delta, step: Step) -> Delta:
    """The merge with what `step` makes of each task's features, merged and its own, in front of its classifier."""
    wanted: list[Tensor] = []
    for task in range(len(plan.deltas)):
        stage.load_expert(task)
        wanted.append(stage.features(task))
    load_merged(stage, plan, merged, 0)
    seen, heads, rank = [stage.features(task) for task in range(len(plan.deltas))], dict[str, Tensor](), 0
    with one_thread():
        for delta, own, goal in zip(plan.deltas, seen, wanted, strict=True):
            name, (down, up) = delta.tasks[0].name, step.run(own, goal)
            rank = len(down)
            heads |= {f"{HEAD}{name}/{n}": t for n, t in corrected(merged.head(name), down, up, name).items()}
    part = Part(method=MLP, graft=MLP, knobs={"hidden": rank, "skip": True})
    return _with_heads(merged, heads, f"corrected by {step.part}").with_(parts=(*merged.parts, part))


def _with_heads(merged: Delta, heads: Mapping[str, Tensor], how: str) -> Delta:
    """Other heads' tensors in place of all, and how they came about."""
    return with_heads(merged, heads).with_(lineage={**merged.lineage, "heads": how})


def logits(merged: Delta, task: str, features: Tensor) -> Tensor:
    """What a merge's own head says of a task's features [n, features], as [n, classes]."""
    built = next(iter(head_parts(merged)), None)
    if built is None:
        return F.linear(features, *linear_head(merged.head(task), task))
    head = build_head(built.module, nn.Linear(features.shape[1], len(merged.task(task).classes)), built.config)
    assert head is not None
    tensors, first = merged.head(task), next(iter(head.state_dict()))
    place = min((n for n in tensors if n.endswith(f".{first}")), key=len).removesuffix(first)
    own = prefixed(tensors, place)
    fill(resized(head, {n: shape_of(own, n) for n in own}).state_dict(), own)
    with torch.no_grad():
        return head(features)


def accuracies(stage: Scene, plan: Plan, merged: Delta) -> list[dict[str, Any]]:
    """Of each task: top-1 of its own delta alone, of the merge with the merge's own head, and the second as a share of the first."""
    found: list[dict[str, Any]] = []
    for task, delta in enumerate(plan.deltas):
        stage.load_expert(task)
        found.append({"task": delta.tasks[0].name, "images": len(stage.labels[task]), "alone": stage.accuracy(task)})
    for task, row in enumerate(found):
        if not task or is_masked(merged):
            load_merged(stage, plan, merged, task)
        guess = logits(merged, row["task"], stage.features(task)).argmax(-1)
        row["merged"] = (guess == stage.labels[task]).double().mean().item()
        row["normalized"] = row["merged"] / row["alone"] if row["alone"] else None
    return found


def _tensors(images: Images, delta: Delta) -> tuple[Tensor, Tensor]:
    task = delta.tasks[0]
    batches = D.loader(images, D.transforms(task.preprocess, train=False), batch_size=BATCH)
    pairs = list(talk.track(batches, task.name, len(batches)))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

"""A merge as it is written, `dare[density=0.5]+ties+svc`: what acts on each task vector, the merge, and what follows it.

    before    changes one tensor of one task vector             (vector) -> tensor
    space     gives coordinates in which the rest happens        (vectors) -> Frame, or None where it leaves a tensor alone
    merge     makes one tensor of all                            (vectors) -> tensor
    after     changes the merged tensor, in sight of the tasks'  (merged, vectors) -> tensor
    heads     corrects what reaches each task's classifier       (merged features, the task's own) -> down, up

The first two stand in any order, then one merge, then what comes after, then what corrects heads; a spec without a merge gets
the one that its last step before it names (`THEN`), or task arithmetic.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vtzoo import knobs, registry
from vtzoo.errors import UsageError
from vtzoo.merges._whole import Frame, Whole, spans_of

_RANK = {"before": 0, "space": 0, "merge": 1, "after": 2, "heads": 3}
IMAGES = 256
"""How many images of each task are looked at where a merge says nothing, as RegMean and Fisher merging do."""
PIECES = 1 << 19
"""So many entries are merged at once: what a merge holds of them stays near, and steps are few."""
_FRAMES = 4
"""How many tensors' coordinates are kept at once: one per worker, and one to spare."""


@dataclass(frozen=True, slots=True)
class Step:
    """One file of the folder with its knobs decoded."""

    part: knobs.Part
    module: Any
    knobs: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """When it acts."""
        return getattr(self.module, "STAGE", "merge")

    @property
    def evidence(self) -> str:
        """The function of `vtzoo.evidence` that tells it of the tasks' images."""
        return getattr(self.module, "EVIDENCE", "")

    @property
    def needs(self) -> str:
        """What it needs of every task, images or labels."""
        return getattr(self.module, "NEEDS", "")

    @property
    def looks(self) -> bool:
        """Whether it must see the merged network at work."""
        return hasattr(self.module, "look")

    @property
    def masks(self) -> bool:
        """Whether it keeps a network of its own for each task."""
        return hasattr(self.module, "mask")

    @property
    def images(self) -> int:
        """How many images of each task it looks at."""
        return getattr(self.module, "IMAGES", IMAGES)

    @property
    def heads(self) -> bool:
        """Whether it looks at what the tasks' classifiers predict."""
        return getattr(self.module, "HEADS", False)

    @property
    def piecewise(self) -> bool:
        """Whether it may be given a tensor in pieces."""
        wanted = getattr(self.module, "PIECEWISE", None)
        return wanted is not None and all(self.knobs[k] == v for k, v in wanted.items())

    def run(self, *args: Any) -> Any:
        """Its function."""
        return getattr(self.module, self.part.name.replace("-", "_"))(*args, **self.knobs)


def steps(spec: str) -> tuple[Step, ...]:
    """Read a spec, refuse what can't be done in that order, and put the merge in where none is named.

    Raises:
        NotFound: no such merge.
        UsageError: wrong knobs, two merges, or a step in the wrong place.
    """
    found = [_step(p) for p in knobs.parse(spec)]
    merges = [s.part.name for s in found if s.stage == "merge"]
    if len(merges) > 1:
        raise UsageError(f"'{spec}' holds {len(merges)} merges: {', '.join(merges)}", f"keep one, such as {merges[0]}")
    if len(fits := [s.part.name for s in found if s.stage == "heads"]) > 1:
        raise UsageError(
            f"'{spec}' corrects heads {len(fits)} times: {', '.join(fits)}", f"keep one, such as {fits[0]}"
        )
    if not merges:
        earlier = [s for s in found if _RANK[s.stage] < _RANK["merge"]]
        then = getattr(earlier[-1].module, "THEN", "task-arithmetic") if earlier else "task-arithmetic"
        found.insert(len(earlier), _step(knobs.one(then)))
    wanted = sorted(found, key=lambda s: _RANK[s.stage])
    if wanted != found:
        raise UsageError(f"'{spec}' is in the wrong order", f"write {written(wanted)}")
    masked = next((s.part.name for s in found if s.masks), "")
    if masked and fits:
        why = f"{masked} keeps a network of its own for each task, and {fits[0]} corrects the features of one"
        raise UsageError(why, f"leave {fits[0]} out, or take --refit-heads expert")
    if masked and len(found) > 1:
        raise UsageError(
            f"{masked} keeps masks of the task vectors as they are, and '{spec}' changes them", f"write {masked} alone"
        )
    spaces = [s.part.name for s in found if s.stage == "space"]
    weights = [s for s in found if s.stage != "heads" and (s.needs or getattr(s.module, "GROUND", False))]
    for step in weights if spaces else ():
        what = "what images tell of the weights" if step.needs else "the backbone's own weights"
        raise UsageError(
            f"{step.part.name} looks at {what}, and {spaces[0]} replaces weights by coordinates",
            f"leave {spaces[0]} out",
        )
    return tuple(found)


def curious(chain: Sequence[Step]) -> Step | None:
    """The step that needs images of every task to merge, where one does."""
    return next((s for s in chain if s.needs and s.stage != "heads"), None)


def correcting(chain: Sequence[Step]) -> Step | None:
    """The step that corrects heads once all is merged, where one does."""
    return next((s for s in chain if s.stage == "heads"), None)


def written(chain: Sequence[Step]) -> str:
    """The spec of a chain."""
    return "+".join(str(s.part) for s in chain)


def _step(part: knobs.Part) -> Step:
    module = registry.load("merges", part.name)
    decoded: Any = knobs.decode(getattr(module, part.name.replace("-", "_")), part.knobs, part.name)
    return Step(part, module, decoded)


def checks(chain: Sequence[Step], weights: Sequence[float]) -> None:
    """Refuse a number of tasks, or weights, that a step can't use.

    Raises:
        UsageError: why.
    """
    for step in chain:
        wanted = getattr(step.module, "TASKS", len(weights))
        if len(weights) != wanted:
            raise UsageError(
                f"{step.part.name} merges {wanted} deltas, not {len(weights)}",
                f"give {wanted}, or take a merge of any number, such as linear or karcher",
            )
        if (check := getattr(step.module, "check", None)) is not None:
            check(weights)


def algorithm(chain: Sequence[Step], whole: Whole) -> Callable[[str], Tensor]:
    """A function that gives the merged tensor of a name, in float32.

    Raises:
        UsageError: a step asks for depths, and the tensors' names tell of no blocks.
    """
    for step in chain:
        if getattr(step.module, "DEPTH", False) and not whole.depths:
            raise UsageError(
                f"{step.part.name} goes by depth, and the backbone's tensors have no numbers of blocks in their names",
                f"leave {step.part.name} out, and give factors with --layers",
            )
    inner, backs = whole, list[Callable[[str, Tensor], Tensor]]()
    for place, step in enumerate(chain):
        if step.stage == "before":
            inner = _changed(inner, step, place)
        elif step.stage == "space":
            inner, back = _moved(inner, step)
            backs.insert(0, back)
    merge = next(s for s in chain if s.stage == "merge")
    after = [s for s in chain if s.stage == "after"]

    def merged(name: str) -> Tensor:
        value = _pieced(merge, whole, name) if inner is whole and merge.piecewise else merge.run(inner.at(name))
        for back in backs:
            value = back(name, value)
        for step in after:
            value = step.run(value, whole.at(name))
        return value

    return merged


def _pieced(step: Step, whole: Whole, name: str) -> Tensor:
    """Merge a tensor piece by piece, where the tasks' can be read so."""
    shape = whole.shapes[name]
    count = math.prod(shape)
    if count <= PIECES or not whole.in_pieces(name):
        return step.run(whole.at(name))
    value = torch.empty(count)
    for start, stop in spans_of(count, PIECES):
        value[start:stop] = step.run(whole.at(name, (start, stop)))
    return value.reshape(shape)


def _changed(whole: Whole, step: Step, place: int) -> Whole:
    def read(task: int, name: str) -> Tensor:
        vector = whole.vector(task, name)
        return step.run(replace(vector, key=f"{vector.key}#{place}"))  # each step draws numbers of its own

    return whole.read_as(read)


def _moved(whole: Whole, step: Step) -> tuple[Whole, Callable[[str, Tensor], Tensor]]:
    @lru_cache(maxsize=_FRAMES)
    def frame(name: str) -> Frame | None:
        return step.run(whole.at(name))

    def into(task: int, name: str) -> Tensor:
        value, own = whole.read(task, name), frame(name)
        return own.into(value) if own else value

    def back(name: str, merged: Tensor) -> Tensor:
        own = frame(name)
        return own.back(merged) if own else merged

    return whole.read_as(into, _Shapes(whole, frame)), back


@dataclass(frozen=True)
class _Shapes(Mapping[str, tuple[int, ...]]):
    """Shapes of coordinates: known only when a tensor's frame is."""

    whole: Whole
    frame: Callable[[str], Frame | None]

    def __getitem__(self, name: str) -> tuple[int, ...]:
        own = self.frame(name)
        return own.shape if own else self.whole.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole.shapes)

    def __len__(self) -> int:
        return len(self.whole.shapes)

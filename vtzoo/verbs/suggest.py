"""Which methods fit a backbone and a budget of parameters, at which knobs, and what each would cost; nothing is trained."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry, talk
from vtzoo.anatomy import Anatomy, survey
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_sized
from vtzoo.costs import Planned, folds, memory_bytes, planned
from vtzoo.errors import Mismatch, UsageError
from vtzoo.installed import head_state
from vtzoo.live import detach, inject
from vtzoo.probing import input_size
from vtzoo.results import Suggested
from vtzoo.sensitivity import scores
from vtzoo.zoo import Zoo

BUDGET = "budget"  # a knob of this name is how many parameters a method spends, below 1 as a share
FARTHEST = 64  # times its default a knob is turned up at most: prompts and ranks beyond make no sense
_SMALL = 0.1
WINDOW = 8  # of values that aren't allowed, so many in a row are looked through


@dataclass(frozen=True)
class _Net:
    """The backbone, with what some methods want to see."""

    model: nn.Module
    anatomy: Anatomy
    batches: list[tuple[Tensor, Tensor]]
    numbers: int
    budget: int
    size: tuple[int, int, int]
    batch_size: int


def suggest(
    *, backbone: str, budget: float, classes: int = 10, zoo: Zoo | None = None, batch_size: int = 32, image_size: int | None = None,
) -> Suggested:  # fmt: skip
    """Try every method of the registry on a backbone: count its parameters, turn its one scaling knob as far as they allow.

    The network is built at random: the weights are not read, so they need not be fetched.

    Args:
        backbone: ref of a backbone, or a timm name.
        budget: trainable parameters of the delta, the head left out; below 1 a fraction of the backbone's, which are the most there is.
        classes: of the task, for the head.
        zoo: where to look.
        batch_size: images per step, for the memory.
        image_size: side of the input in pixels, if not the backbone's own.

    Returns:
        `report`: backbone and budget in parameters, the head's parameters; `fits`, those that fold first and then the
        largest first (no promise of accuracy): name, spec with the largest knob that fits (up to 64 times its default),
        parameters, share of the backbone, parameters at default knobs, folds (yes, no, or when: not at these knobs, but
        at others), about_folding, memory_bytes (see `vtzoo.costs`), file_bytes; and `refused`: name and reason.

    Raises:
        NotFound: neither the zoo nor timm knows the backbone.
        UsageError: a budget of less than one parameter, or no classes.
    """
    if classes < 1 or batch_size < 1:
        raise UsageError(f"{classes} classes in batches of {batch_size}", "give one of each at least")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        card, model = build_sized(
            resolved_card(backbone, zoo), image_size, zoo=zoo, pretrained=False, num_classes=classes
        )
        net = _net(model, budget, card.preprocess.input_size, batch_size)
        fits: list[dict[str, Any]] = []
        refused: list[dict[str, str]] = []
        names = registry.names("methods")
        for name in talk.track(names, "methods", len(names)):
            try:
                fits.append(_row(net, name))
            except (UsageError, Mismatch) as refusal:
                refused.append({"name": name, "reason": str(refusal)})
    order = ("yes", "when", "no")
    fits.sort(key=lambda row: (order.index(row["folds"]), -row["parameters"], row["name"]))
    head = sum(t.numel() for t in head_state(model).values())
    report: dict[str, Any] = {"backbone_parameters": net.numbers, "budget": net.budget, "head_parameters": head}
    report |= {"batch_size": batch_size, "input_size": list(net.size), "fits": fits, "refused": refused}
    return Suggested(ref=card.name, path="", report=report)


def _net(model: nn.Module, budget: float, size: tuple[int, int, int], batch_size: int) -> _Net:
    """Survey the backbone; methods that choose by images are shown noise, since their counts don't depend on it.

    What starts at zero (the last norm of a residual branch) is moved off it, or the branch would pass no gradient.
    """
    for value in model.parameters():
        if not value.any():
            value.data.fill_(_SMALL)
    batches = [(torch.randn(4, *input_size(model)), torch.arange(4) % 2)]
    anatomy = survey(model, rate=lambda: scores(model, batches), batches=batches)
    numbers = sum(model.get_parameter(n).numel() for n in anatomy.parameter_names)
    wanted = int(min(budget, numbers) if budget >= 1 else budget * numbers)
    if wanted < 1:
        raise UsageError(
            f"a budget of {budget:g} is less than one of {numbers} parameters", "for example 0.3M, or 0.01"
        )
    return _Net(model, anatomy, batches, numbers, wanted, size, batch_size)


def _row(net: _Net, name: str) -> dict[str, Any]:
    """What is said of one method.

    Raises:
        UsageError, Mismatch: why it doesn't fit.
    """
    default, plan, spec = _largest(net, name)
    foldable, why = folds(plan, net.model)
    card = registry.card("methods", name)
    conditional = card.verdict == "when"
    inject(net.model, spec, batches=net.batches)
    try:
        memory = memory_bytes(net.model.train(), net.size, net.batch_size)
    except RuntimeError as error:
        raise UsageError(f"does not run on images of this size: {str(error).splitlines()[0]}") from error
    finally:
        detach(net.model.eval())
    return {
        "name": name,
        "spec": spec,
        "parameters": plan.params,
        "share": plan.params / net.numbers,
        "default_parameters": default,
        "folds": "yes" if foldable else "when" if conditional else "no",
        "about_folding": card.folds if foldable or conditional else why,
        "memory_bytes": memory,
        "file_bytes": plan.file_bytes,
    }


def _largest(net: _Net, name: str) -> tuple[int, Planned, str]:
    """Parameters at default knobs, the largest plan within the budget, and its spec.

    Raises:
        UsageError: it doesn't fit the backbone, or not even its smallest delta fits the budget.
    """
    plan = planned(net.anatomy, name, {})
    if BUDGET in plan.part.knobs:
        spent = planned(net.anatomy, name, {BUDGET: net.budget})
        return plan.params, spent, str(knobs.Part(name, {BUDGET: str(net.budget)}))
    knob, start = _scaling(net, plan)
    plans: dict[int, Planned | None] = {start: plan}

    def count(value: int) -> int | None:
        if value not in plans:
            plans[value] = _try(net, name, {knob: value})
        found = plans[value]
        return None if found is None else found.params

    value = largest(count, start, net.budget) if knob else start
    best = plans[value] if value is not None else None
    if best is None or best.params > net.budget:
        least = min(p.params for p in plans.values() if p is not None)
        raise UsageError(f"{least} parameters at the least, and the budget is {net.budget}", "raise the budget")
    return plan.params, best, str(knobs.Part(name, {knob: str(value)} if value != start else {}))


def _scaling(net: _Net, plan: Planned) -> tuple[str, int]:
    """The whole-number knob that makes a delta larger, and its default; ("", 0) where there is none."""
    for knob, default in plan.part.knobs.items():
        if type(default) is int and default > 0:
            for value in (2 * default, default + 1, default - 1):
                other = _try(net, plan.part.method, {knob: value})
                if other is not None and (other.params - plan.params) * (value - default) > 0:
                    return knob, default
    return "", 0


def _try(net: _Net, name: str, values: Mapping[str, Any]) -> Planned | None:
    try:
        return planned(net.anatomy, name, values)
    except UsageError:
        return None


def largest(count: Callable[[int], int | None], start: int, budget: int) -> int | None:
    """The largest value, from 1 to FARTHEST times the start, whose count is within the budget; None where none is.

    Counts must not fall as values grow; where larger values add nothing, the smallest of them is taken.

    Args:
        count: of a value; None where it isn't allowed, and the next lower one counts.
        start: an allowed value.
        budget: the most that a count may be.
    """

    @cache
    def near(value: int) -> float:
        below = range(value, max(0, value - WINDOW), -1)
        found = next((c for v in below if (c := count(v)) is not None), None)
        return found if found is not None else math.inf if value > start else 0

    doubled = (start << k for k in range(FARTHEST.bit_length()))
    values = range(next((v for v in doubled if near(v) > budget), FARTHEST * start) + 1)  # no farther than need be
    best = bisect_right(values, budget, key=near) - 1
    return bisect_left(values, near(best), key=near) or None

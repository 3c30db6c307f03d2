"""The first weights of a network, from another one's: `vtzoo.inits` applied to live models."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import knobs, registry, talk
from vtzoo.errors import ShapeMismatch
from vtzoo.inits._plan import Plan, spread
from vtzoo.probing import evaluating, input_size
from vtzoo.silence import silent
from vtzoo.sketch import sketched, state_of

NEAR = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far outputs may lie apart, as a share of the largest, to count as those of the same function."""


@torch.no_grad()
def started(
    student: nn.Module,
    source: nn.Module,
    spec: str,
    *,
    name: str = "the source",
    labels: Sequence[str] = (),
    source_labels: Sequence[str] = (),
) -> nn.Module:
    """Give a network its first weights from another one's, in place, and say how much of it.

    In `vtzoo distill`, for `--init SPEC [--init-from REF]`, after the student is built:

        giver = go_live(open_ref(init_from or teachers[0], zoo), task, plain=True)
        started(model, giver.model, init, name=giver.card.name, labels=images.classes, source_labels=giver.task.classes if giver.task else ())

    where `labels` is () for a loss without logits, and a delta that does not fold goes live without `plain`: it gives its backbone's weights.

    Args:
        student: with its own first weights, which stay wherever the source has none for them.
        source: plain; of what is grafted on it nothing is taken over.
        spec: "weight-selection[layers=uniform]", "net2net", "fna", "resize".
        name: the source's, for what is said.
        labels: of the student's classes; without any on either side, heads of one size are taken to have the same classes.
        source_labels: of the source's. A head with another number of classes than labels stays fresh, or gives nothing.

    Raises:
        ShapeMismatch: the networks are no family, or can't be what the way promises; the student keeps its weights.
        NotFound: no way is called so.
        UsageError: a knob that it hasn't, or a wrong value.
    """
    part = knobs.one(spec)
    module = registry.load("inits", part.name)
    function = getattr(module, part.name.replace("-", "_"))
    chosen = knobs.decode(function, part.knobs, part.name)
    assert isinstance(chosen, dict)
    plan = planned(student, source, labels, source_labels)
    given, own = state_of(source), state_of(student)
    values: dict[str, Tensor] = function(given, own, plan, **chosen)
    exact: Mapping[str, Any] | None = getattr(module, "EXACT", None)
    if exact is not None and values:
        plain = {**chosen, **exact}
        _prove(student, source, plan, values if plain == chosen else function(given, own, plan, **plain), part.name)
    if not values:
        raise ShapeMismatch(
            f"a {plan.target.name} has nothing in common with this {plan.source.name}",
            "take a source of the student's family, or leave --init out",
        )
    _load(own, values)
    talk.say(_told(own, values, name))
    return student


def planned(
    student: nn.Module, source: nn.Module, labels: Sequence[str] = (), source_labels: Sequence[str] = ()
) -> Plan:
    """What is known of both networks; each runs one image."""
    many, few = (int(getattr(m, "num_classes", 0) or 0) for m in (student, source))
    known: dict[Any, int] = {label: row for row, label in enumerate(source_labels)}
    same = not labels and not source_labels and many == few
    classes = tuple(range(many)) if same else tuple(known.get(label) for label in labels)
    fitting = len(classes) == many and (same or len(source_labels) == few)
    return Plan(
        source=sketched(source),
        target=sketched(student),
        classes=classes if fitting else (None,) * many,
        silent=partial(silent, student),
    )


def _load(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        own[name].copy_(value)


def _prove(student: nn.Module, source: nn.Module, plan: Plan, values: Mapping[str, Tensor], way: str) -> None:
    """Compare both networks on random images; the student has its own weights again afterwards.

    Raises:
        ShapeMismatch: they are two functions.
    """
    own = state_of(student)
    before = {n: own[n].clone() for n in values}
    try:
        _load(own, values)
        apart = _apart(student, source, plan)
    except (AssertionError, RuntimeError, ValueError) as error:  # all that timm and torch raise
        raise ShapeMismatch(
            f"the source does not run on the student's images of {'x'.join(map(str, input_size(student)[1:]))} pixels",
            "give the student the source's input size",
        ) from error
    finally:
        _load(own, before)
    if apart > NEAR.get(next(student.parameters()).dtype, 1e-2):
        raise ShapeMismatch(
            f"{way} keeps the function, and this {plan.target.name} would give other outputs than the source "
            f"({apart:.0%} of the largest)",
            "give it the source's layers in larger sizes, or take weight-selection or fna",
        )


def _apart(student: nn.Module, source: nn.Module, plan: Plan) -> float:
    """The largest difference of their outputs over the largest output; of classes that both have, or of features."""
    rows = [(i, row) for i, row in enumerate(plan.classes) if row is not None]
    size, like = input_size(student), next(student.parameters())
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(like)
    with evaluating(student), evaluating(source):
        if rows:
            ours, theirs = student(x), source(x.to(next(source.parameters()))).to(like)
            here, there = (list(side) for side in zip(*rows, strict=True))
            ours, theirs = ours[:, here], theirs[:, there]
        else:
            ours, theirs = (_features(m, x.to(next(m.parameters()))).to(like) for m in (student, source))
            theirs = theirs[..., spread(theirs.shape[-1], ours.shape[-1])]
    return ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(float("inf")).item()


def _features(model: Any, x: Tensor) -> Tensor:
    return (
        model.forward_head(model.forward_features(x), pre_logits=True) if hasattr(model, "forward_head") else model(x)
    )


def _told(own: Mapping[str, Tensor], values: Mapping[str, Tensor], name: str) -> str:
    fresh = [n for n in own if n not in values]
    shown = f", {len(fresh)} fresh: {', '.join(fresh[:5])}{' …' if len(fresh) > 5 else ''}" if fresh else ""
    return f"{len(values)} of {len(own)} tensors from {name}{shown}"

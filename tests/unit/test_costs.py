"""costs.py and the search of `suggest`: what is counted beforehand is what comes out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import families
from tests.contract.cases import METHODS, SUPPORT, TASK, works
from vtzoo import registry
from vtzoo.anatomy import survey
from vtzoo.costs import folds, memory_bytes, planned
from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.installed import head_state
from vtzoo.live import extract, inject, trainable
from vtzoo.methods._protocol import prepares
from vtzoo.sensitivity import scores
from vtzoo.verbs.suggest import FARTHEST, largest

KEEPING = [m for m in METHODS if prepares(registry.load("methods", m))]
PAIRS = [(m, f) for m in METHODS for f in ("vit", "resnet") if works(m, f) and m not in KEEPING]


def _anatomy(family: str):
    model, batches = families.build(family, dtype=torch.float32), families.labelled(family, dtype=torch.float32)
    return survey(model, rate=lambda: scores(model, batches), batches=batches)


@pytest.mark.parametrize("method", KEEPING)
def test_what_keeps_images_costs_as_many_as_there_are(method: str) -> None:
    """Nobody knows how many beforehand, so it is refused, with what tells it."""
    with pytest.raises(UsageError, match="every training image") as refusal:
        planned(_anatomy("vit"), method, {})
    assert "--dry-run" in str(refusal.value.hint)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_a_plan_is_what_is_injected(method: str, family: str, tmp_path) -> None:
    """Planned names, shapes, parameters and fold are those of the delta; the file's size is right to its metadata."""
    anatomy = _anatomy(family)
    plan = planned(anatomy, method, {})
    assert all(t.is_meta for t in plan.tensors.values())
    assert folds(plan, anatomy.model)[0] is (SUPPORT[method][family] == "folds" and method != "mlp-head")
    model = families.build(family, dtype=torch.float32)
    plain = sum(p.numel() for p in head_state(model).values())
    inject(model, method, batches=families.labelled(family, dtype=torch.float32))
    assert plan.params == sum(p.numel() for p in trainable(model).values()) - plain
    delta = extract(model, tasks=[TASK])
    ours = {n: (tuple(t.shape), t.dtype) for n, t in delta.tensors.items() if not n.startswith("@")}
    assert {n: (tuple(t.shape), t.dtype) for n, t in plan.tensors.items()} == ours
    delta.save(tmp_path / "d.safetensors")
    size = (tmp_path / "d.safetensors").stat().st_size
    assert Delta.open(tmp_path / "d.safetensors").method == method
    assert 0 < size - plan.file_bytes < 1500


def test_a_refusal_to_fold_has_its_reason() -> None:
    """What can't fold says why, without the method's name before it."""
    model = families.build("vit")
    for method, words in (("adapter", "an activation stands between"), ("mlp-head", "head")):
        foldable, why = folds(planned(_anatomy("vit"), method, {}), model)
        assert not foldable
        assert words in why
        assert not why.startswith(method)


class Net(nn.Module):
    """A frozen layer, an activation, a trained layer; and a weight that is made anew in each step."""

    def __init__(self, *, gain: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 2 * 2, 5), nn.Linear(5, 7)
        self.gain = nn.Parameter(torch.ones(5)) if gain else None
        self.requires_grad_(requires_grad=False)
        self.second.requires_grad_()
        if self.gain is not None:
            self.gain.requires_grad_()
            self.second.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 2, 2] -> [n, 7]."""
        hidden = F.relu(self.first(x.flatten(1)))
        if self.gain is None:
            return self.second(hidden)
        return F.linear(F.tanh(hidden * self.gain), self.second.weight * self.gain, self.second.bias)


def test_memory_is_counted_by_hand() -> None:
    """4 bytes a frozen number, 16 a trained one, per image what the backward pass needs, and once what no image adds to."""
    first, second = 12 * 5 + 5, 5 * 7 + 7
    # the trained layer keeps its input of 5 numbers
    assert memory_bytes(Net(gain=False), (3, 2, 2), 9) == 4 * first + 16 * second + 9 * 4 * 5
    # the gain keeps the 5 numbers that it scales, tanh its 5; the new weight is kept once for all images
    assert memory_bytes(Net(gain=True), (3, 2, 2), 9) == 4 * (first + second) + 16 * 5 + 4 * 5 * 7 + 9 * 4 * (5 + 5)


COUNTS: dict[str, Callable[[int], int | None]] = {
    "even": lambda v: 12 * v,
    "with a constant": lambda v: 1000 + 7 * v,
    "squares": lambda v: v * v,
    "cubes": lambda v: v**3,
    "stairs": lambda v: 100 * v + (v // 16) * 500,
    "even numbers alone": lambda v: 50 * v if v % 2 == 0 else None,
    "up to 24": lambda v: 30 * v if v <= 24 else None,
}


@pytest.mark.parametrize("budget", [0, 5, 999, 1000, 1007, 4321, 10**6])
@pytest.mark.parametrize("name", COUNTS)
def test_the_largest_value_is_found(name: str, budget: int) -> None:
    """Where counts grow, it is the one that a search through all values finds, wherever it starts; with few questions."""
    for start in (1, 8, 500):
        allowed = {v: c for v in range(1, FARTHEST * start + 1) if (c := COUNTS[name](v)) is not None}
        if start not in allowed:
            continue
        wanted = max((v for v, c in allowed.items() if c <= budget), default=None)
        asked: set[int] = set()

        def count(value: int, asked: set[int] = asked, allowed: dict[int, int] = allowed) -> int | None:
            asked.add(value)
            return allowed.get(value)

        assert largest(count, start, budget) == wanted
        assert len(asked) < 80


@pytest.mark.parametrize("start", [8, 32, 100])
def test_a_knob_that_stops_growing(start: int) -> None:
    """Beyond what a layer can hold a larger rank adds nothing: the smallest that gives the most is taken."""
    assert largest(lambda v: 10 * min(v, 32), start, 10**6) == 32
    assert largest(lambda v: 10 * min(v, 32), start, 95) == 9
    assert largest(lambda _: 70, start, 70) == 1
    assert largest(lambda _: 70, start, 69) is None

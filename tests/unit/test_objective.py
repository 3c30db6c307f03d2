"""Sums of losses: how they are written, and what they add up."""

import pytest
import torch

from vtzoo import knobs
from vtzoo.errors import UsageError
from vtzoo.losses._outputs import Outputs, Shapes
from vtzoo.objective import Objective, needs_of, read


def test_a_sum_is_read_with_its_factors() -> None:
    """Factors stand before a loss with a star; without one it is 1; knobs are each loss's own."""
    found = knobs.weighted("kd[temperature=2] + 0.5*feature[kind=cosine]+2*hard")
    assert [(w, p.name, p.knobs) for w, p in found] == [
        (1.0, "kd", {"temperature": "2"}), (0.5, "feature", {"kind": "cosine"}), (2.0, "hard", {}),
    ]  # fmt: skip
    terms = read("kd[temperature=2]+0.5*feature")
    assert needs_of(terms) == {"logits", "features"}
    assert terms[0].facts == {"function": "kd", **terms[0].chosen}
    assert terms[0].facts["temperature"] == 2.0
    assert terms[1].facts["weight"] == 0.5


@pytest.mark.parametrize("factor", ["1e+3", "1E+3", "1.e+3", ".1e+4", "1e3", " 1000 "])
def test_a_factor_may_have_an_exponent_with_a_plus(factor: str) -> None:
    """The plus of 1e+3 adds no loss, wherever the term stands; one in brackets is its knob's."""
    found = knobs.weighted(f"{factor}*kd[temperature=1e+1]+hard+{factor}*kd")
    assert [(w, p.name, p.knobs) for w, p in found] == [
        (1000.0, "kd", {"temperature": "1e+1"}), (1.0, "hard", {}), (1000.0, "kd", {}),
    ]  # fmt: skip


@pytest.mark.parametrize("spec", ["", "0*kd", "-1*kd", "inf*kd", "nan*kd", "x*kd", "*kd", "kd+"])
def test_what_is_no_sum_is_refused(spec: str) -> None:
    """Nothing, factors that are no positive numbers, and a plus without a loss."""
    with pytest.raises(UsageError) as refusal:
        knobs.weighted(spec)
    assert refusal.value.hint


def test_a_sum_adds_its_terms_up() -> None:
    """With factors; a loss on features is the mean over teachers, one on logits compares with all together, once."""
    torch.manual_seed(0)
    ours = Outputs(torch.randn(4, 3), torch.randn(4, 5))
    theirs = [Outputs(torch.randn(4, 3), torch.randn(4, 7)), Outputs(None, torch.randn(4, 2))]
    theirs[1] = Outputs(theirs[0].logits, theirs[1].features)
    labels, who = torch.tensor([0, 1, 2, 0]), ["a" * 64, "b" * 64]
    shapes = {"a" * 64: Shapes(7), "b" * 64: Shapes(2)}
    samples = {w: 3 * torch.randn(20, s.features) + 1 for w, s in shapes.items()}

    def value(spec: str, teachers: list[int]) -> float:
        torch.manual_seed(1)
        objective = Objective(read(spec), Shapes(5), shapes, samples)
        return objective(ours, [theirs[i] for i in teachers], labels, [who[i] for i in teachers]).item()

    kd = value("kd", [0])
    assert value("kd", [0, 1]) == pytest.approx(kd)
    assert value("kd+2*hard", [0]) == pytest.approx(kd + 2 * value("hard", [0]), rel=1e-6)
    first, second = value("feature", [0]), value("feature", [1])
    assert first != second
    assert value("feature", [0, 1]) == pytest.approx((first + second) / 2, rel=1e-6)
    assert value("0.5*feature+kd", [0, 1]) == pytest.approx(kd + (first + second) / 4, rel=1e-6)


def test_what_is_trained_beside_the_student_is_the_bridges() -> None:
    """One for each loss and teacher that need one; standard forms are fitted, and stay as they are."""
    shapes = {"a": Shapes(7), "b": Shapes(2)}
    samples = {w: 3 * torch.randn(20, s.features) + 1 for w, s in shapes.items()}
    objective = Objective(read("feature+kd"), Shapes(5), shapes, samples)
    assert sorted(objective.bridges) == ["0 a", "0 b"]
    trained = {n for n, p in objective.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith("bridges.") for n in trained)
    scaled = objective.standards["0 a"](samples["a"])
    assert scaled.mean().abs() < 1e-5
    assert abs(scaled.std().item() - 1) < 0.1

"""Each loss beside torchdistill's, or beside the paper's formula in plain loops: values, and gradients of all the student gives."""

import pytest
import torch

from tests.parity.loss_references import CASES, Case, differences
from vtzoo import registry

SEEDS = range(5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec}, {c.reference}")
def test_value_and_gradient(case: Case, agree) -> None:
    """In float64 they are the reference's but for rounding, whatever the shapes."""
    values, gradients = zip(*(differences(case, seed) for seed in SEEDS), strict=True)
    agree(case.spec, case.reference, value=max(values), gradient=max(gradients))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec}, {c.reference}")
def test_in_float32(case: Case, agree) -> None:
    """In float32 they are within some roundings of float64's."""
    values, gradients = zip(*(differences(case, seed, torch.float32) for seed in SEEDS), strict=True)
    agree(case.spec, f"{case.reference}, float32", 2e-4, value=max(values), gradient=max(gradients))


def test_every_loss_has_a_reference() -> None:
    """No loss of the registry is left out."""
    assert {case.spec.partition("[")[0] for case in CASES} == set(registry.names("losses"))

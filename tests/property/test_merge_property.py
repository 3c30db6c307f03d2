"""Merges on arbitrary small task vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contract.merge_cases import MERGES, each
from vtzoo.knobs import Part
from vtzoo.merges._chain import algorithm, steps
from vtzoo.merges._floor import floors
from vtzoo.merges._whole import Whole

ENTRY = st.floats(-1e3, 1e3, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 0.5])
ROW = st.lists(ENTRY, min_size=6, max_size=6).map(torch.tensor)
PIECES = st.lists(st.lists(ENTRY, min_size=1, max_size=9).map(torch.tensor), min_size=1, max_size=5)
ROWS = st.lists(ROW, min_size=1, max_size=4)
BLOCKS = {f"blocks.{i}.x": torch.zeros(1) for i in range(2)}
WEIGHTS = st.floats(0.125, 2.0, width=32)


class Fresh(dict):
    """Gives a new tensor at each access, as task vectors do."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).clone()


def run(merge: str, rows: list[Tensor], weights: list[float], **knobs: object) -> Tensor:
    """A merge of one tensor, halves of which lie in two tensors of the task vectors."""
    sources = [Fresh({"a": r[:4], "b": r[4:]}) for r in rows]
    merged = algorithm(
        steps(str(Part(merge, {k: str(v) for k, v in knobs.items()}))),
        Whole(sources, weights, {"a": (4,), "b": (2,)}, evidence=[{}] * len(rows), ground=BLOCKS),
    )
    return torch.cat([merged(n) for n in ("a", "b")])


@pytest.mark.parametrize("merge", each([m for m in MERGES if m not in ("dare", "della", "karcher", "slerp", "svc")]))
@given(rows=ROWS, data=st.data())
@settings(deadline=None, max_examples=50)
def test_merges_stay_finite_and_within_their_inputs(merge, rows, data):
    """With positive weights no entry is larger than the weighted magnitudes of the inputs add up to."""
    weights = [data.draw(WEIGHTS) for _ in rows]
    out = run(merge, rows, weights, **({"scale": 1} if merge == "pcb" else {}))  # its own is 1.2
    bound = sum(r.abs() * max(w, 1.0) for r, w in zip(rows, weights, strict=True))
    assert out.isfinite().all()
    assert (out.abs() <= bound * 1.0001 + 1e-6).all()


@pytest.mark.parametrize("merge", each([m for m in MERGES if m not in ("slerp", "svc")]))
@given(rows=ROWS)
@settings(deadline=None, max_examples=50)
def test_merges_turn_round_with_their_inputs(merge, rows):
    """Task vectors of the opposite sign merge to the opposite."""
    weights = [1.0] * len(rows)
    assert torch.equal(run(merge, rows, weights), -run(merge, [-r for r in rows], weights))


@given(rows=ROWS)
@settings(deadline=None, max_examples=100)
def test_ties_follows_one_side(rows):
    """Every entry of TIES is zero or has the sign of the elected sum, and lies among the values that agree."""
    out, table = run("ties", rows, [1.0] * len(rows), density=1.0), torch.stack(rows).double()
    for value, column in zip(out.double(), table.T, strict=True):
        agree = column[column.sign() == value.sign()]
        if value != 0:
            assert agree.min() * (1 - 1e-6) - 1e-6 <= value <= agree.max() * (1 + 1e-6) + 1e-6 or value < 0
            assert agree.abs().min() * (1 - 1e-6) <= value.abs() <= agree.abs().max() * (1 + 1e-6)


@given(pieces=PIECES, density=st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=200)
def test_the_floor_keeps_the_share(pieces, density):
    """At least the share of the non-zero entries reaches the floor, and without those that equal it fewer do."""
    magnitudes = torch.cat(pieces).abs()
    magnitudes = magnitudes[magnitudes >= 1e-40]
    least = floors(lambda: ((0, p.clone) for p in pieces), 1, density)[0]
    wanted = max(1, round(density * len(magnitudes))) if len(magnitudes) else 0
    assert int((magnitudes >= least).sum()) >= wanted
    assert int((magnitudes > least).sum()) < max(wanted, 1)

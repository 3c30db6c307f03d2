"""The order in which a search goes through networks, against the whole list."""

from itertools import product
from math import fsum

from hypothesis import given, settings
from hypothesis import strategies as st

from vtzoo.dna._traversal import ranked


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[list[float]], list[list[list[float]]], list[float]]:
    """Ratings, one or two costs and their budgets; of few values, so that many networks tie."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    number = st.one_of(st.integers(0, 3).map(float), st.floats(0, 3, width=32))

    def table() -> list[list[float]]:
        return [draw(st.lists(number, min_size=w, max_size=w)) for w in widths]

    costs = [table() for _ in range(draw(st.integers(0, 2)))]
    return table(), costs, [draw(st.floats(0, 3 * len(widths))) for _ in costs]


def _sum(table: list[list[float]], choice: tuple[int, ...]) -> float:
    return fsum(row[c] for row, c in zip(table, choice, strict=True))


@given(_tables())
@settings(max_examples=300, deadline=None)
def test_all_networks_within_the_budgets_come_out_in_order(given_: tuple) -> None:
    """Each once, by rating, then by costs, then by choice; nothing over a budget, and nothing within it is missed."""
    ratings, costs, budgets = given_
    every = product(*(range(len(row)) for row in ratings))
    fitting = [c for c in every if all(_sum(t, c) <= b for t, b in zip(costs, budgets, strict=True))]
    assert list(ranked(ratings, costs, budgets)) == sorted(
        fitting, key=lambda c: (_sum(ratings, c), *(_sum(t, c) for t in costs), c)
    )


@given(_tables(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_budget_that_is_just_enough_is(given_: tuple, data: st.DataObject) -> None:
    """A network that has exactly what is allowed is within the budget, however its sum was rounded."""
    ratings, costs, _ = given_
    choice = tuple(data.draw(st.integers(0, len(row) - 1)) for row in ratings)
    assert choice in set(ranked(ratings, costs, [_sum(t, choice) for t in costs]))

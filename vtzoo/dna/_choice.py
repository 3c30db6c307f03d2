"""The best-rated network within budgets: by what its stages add up to, and of latency as measured in one piece."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from vtzoo.dna._costs import Cost
from vtzoo.dna._traversal import Choice, Table, ranked, total
from vtzoo.errors import UsageError

MS = "ms"
FEW, ROUNDS = 3, 3
"""How many of the best are measured in turns, and how often; each time sums are set right by what was measured."""
Measure = Callable[[Sequence[Choice]], Sequence[float]]


@dataclass(frozen=True)
class Found:
    """What comes out of a search.

    Attributes:
        choice: of each stage.
        costs: by kind.
        measured: networks that were timed whole, in milliseconds.
    """

    choice: Choice
    costs: Mapping[str, Cost]
    measured: Mapping[Choice, float]


def within(
    ratings: Table, costs: Mapping[str, Cost], budgets: Mapping[str, float], late: float = 0.0
) -> Iterator[Choice]:
    """Networks within all budgets by kind, best first; `late` is by how many milliseconds whole networks are over their sums."""
    left = [most - costs[kind].rest - (late if kind == MS else 0.0) for kind, most in budgets.items()]
    return ranked(ratings, [costs[kind].stages for kind in budgets], left)


def check_affordable(costs: Mapping[str, Cost], budgets: Mapping[str, float], wholes: Mapping[str, float]) -> None:
    """Refuse budgets that no network keeps together, by what the least ones have; `wholes` are the teacher's, for shares.

    Raises:
        UsageError: says how much is the least of each.
    """
    alike = [[0.0] * len(row) for row in next(iter(costs.values())).stages]
    if next(within(alike, costs, budgets), None) is None:
        raise too_small({kind: costs[kind].of(costs[kind].least) for kind in budgets}, budgets, wholes)


def too_small(least: Mapping[str, float], budgets: Mapping[str, float], wholes: Mapping[str, float]) -> UsageError:
    """The refusal of budgets that are less than anything in the space needs."""
    told = [
        f"{least[k]:.3g} ms, not {most:.3g}" if k == MS else f"{least[k] / wholes[k]:.2%} of the {k.replace('_', '-')}, not {most / wholes[k]:.2%}"
        for k, most in budgets.items()
    ]  # fmt: skip
    return UsageError(
        f"no network of these is as small; the least of each alone: {'; '.join(told)}",
        "give a larger budget, or a narrower space: width=24",
    )


def chosen(
    ratings: Table, costs: Mapping[str, Cost], budgets: Mapping[str, float], measure: Measure
) -> tuple[Choice, dict[Choice, float]]:
    """The best-rated network, and those that were measured as a whole, in milliseconds; none where latency has no budget.

    Raises:
        UsageError: none keeps the budget as measured.
    """
    if MS not in budgets:
        return next(within(ratings, costs, budgets)), {}
    measured: dict[Choice, float] = {}
    late = 0.0
    for _ in range(ROUNDS):
        new = [c for c in islice(within(ratings, costs, budgets, late), FEW) if c not in measured]
        if not new:
            break
        measured |= zip(new, measure(new), strict=True)
        late = median(ms - costs[MS].of(c) for c, ms in measured.items())
    if not any(ms <= budgets[MS] for ms in measured.values()):
        others = {k: b for k, b in budgets.items() if k != MS}
        quickest = next(within(costs[MS].stages, costs, others))
        measured |= {} if quickest in measured else {quickest: measure([quickest])[0]}
    kept = [c for c, ms in measured.items() if ms <= budgets[MS]]
    if not kept:
        raise too_small({MS: min(measured.values())}, {MS: budgets[MS]}, {})
    return min(kept, key=lambda c: (total(ratings, c), measured[c])), measured

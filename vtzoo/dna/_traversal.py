"""All networks of a space within budgets, best first, none of them looked at before its turn.

A network is a choice for each stage; its rating and each of its costs are sums over the stages. What is open of a network counts as its
least, so that whatever comes out of the queue complete is the next best (best-first branch and bound).
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from math import fsum

Table = Sequence[Sequence[float]]
"""What each choice of each stage adds."""
Choice = tuple[int, ...]
"""Of the first stages, or of all."""


def total(table: Table, choice: Choice) -> float:
    """A network's sum; of an unfinished one the least that it can come to. Rounded once, so that no bound lies above what it bounds."""
    return fsum([row[c] for row, c in zip(table, choice, strict=False)] + [min(row) for row in table[len(choice) :]])


def ranked(ratings: Table, costs: Sequence[Table], budgets: Sequence[float]) -> Iterator[Choice]:
    """Networks in rising order of their rating; of equal ones the cheaper first (by the first cost, then the next), then by choice.

    Args:
        ratings: lower is better.
        costs: any number of kinds.
        budgets: the most that a network may have of each.
    """
    queue: list[tuple[tuple[float, ...], Choice]] = [((), ())]
    while queue:
        _, choice = heappop(queue)
        if len(choice) == len(ratings):
            yield choice
            continue
        for last in range(len(ratings[len(choice)])):
            longer = (*choice, last)
            spent = [total(table, longer) for table in costs]
            if all(s <= b for s, b in zip(spent, budgets, strict=True)):
                heappush(queue, ((total(ratings, longer), *spent), longer))

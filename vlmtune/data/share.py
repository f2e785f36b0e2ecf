"""Which samples of an optimizer step one of several processes trains on."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """lengths: of each source, what tells the tokens of a row before it is encoded; None where nothing was counted."""

    rank: int
    size: int
    lengths: Sequence[Callable[[int], int] | None]

    def of(self, samples: Sequence[tuple[int, int]]) -> list[int]:
        """Numbers of this process's samples. samples: (source, row) of a whole step, at least as many as processes. A
        pure function, the same in all of them: nobody has to say who takes what."""
        costs = [None if (length := self.lengths[source]) is None else length(row) for source, row in samples]
        known = [cost for cost in costs if cost is not None]
        usual = sum(known) / len(known) if known else 1
        return deal([usual if cost is None else cost for cost in costs], self.size)[self.rank]


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Numbers of the items of each of `size` hands: the most expensive first, each to the hand with the least so far
    (Graham 1969: at most 4/3 of the best possible maximum). No hand is empty where there are enough items.

    Items of a hand are in ascending order. Raises ValueError for fewer items than hands.
    """
    if len(costs) < size:
        raise ValueError(f"{len(costs)} items for {size} hands")
    hands: list[list[int]] = [[] for _ in range(size)]
    least = [(0.0, 0, hand) for hand in range(size)]  # cost, items, hand: ties go to the hand with fewer items
    for item in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        cost, items, hand = heapq.heappop(least)
        hands[hand].append(item)
        heapq.heappush(least, (cost + costs[item], items + 1, hand))
    return [sorted(hand) for hand in hands]

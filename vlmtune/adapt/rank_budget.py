"""Ranks from a total budget: importance says who gets how much, and the budget is met to the last parameter (SPEC F2).

Rounding every module's share to a multiple of 4 misses the budget, by up to 2 ranks for each module. Here the shares
are a target, and of all ranks that cost exactly the budget those nearest to the target are taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmtune.types import VlmtuneError

LEAST = 1e-12
"""Share of the largest importance below which none counts less: a module nothing depends on still has an order."""


def allocate_ranks(
    importance: Mapping[str, float],
    costs: Mapping[str, int] | None,
    budget: int,
    multiple: int = 4,
    lowest: int = 4,
    highest: int = 64,
    power: float = 0.5,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Name -> rank, a multiple of `multiple` from `lowest` to `highest`, with sum of cost x rank == `budget`.

    importance: 0 or more, in any unit; costs: of one rank (in + out for LoRA parameters), None: 1 each, so that the
    budget is the sum of ranks; limits: largest rank that a module can have, where that is below `highest`.

    The target is rank = c x importance^power, cut off at the bounds, with the one c that spends the budget; power 0.5
    makes it follow the gradient's norm where importance is a Fisher trace, 0 makes it uniform. The ranks minimise the
    squared distance to the target. Of two modules with equal cost and limit the more important one never has the
    lower rank; equal ones are served in the order of `importance`. The result is exact and always the same.

    Raises VlmtuneError for numbers that make no sense, a module that is too small for any allowed rank, and a budget
    that no allowed ranks cost, naming the nearest ones that some do.
    """
    modules = _modules(importance, costs, limits, multiple, lowest, highest, power)
    classes = _classes(modules, _targets(modules, budget, multiple), multiple)
    fixed = sum(m.cost * multiple * m.low for m in modules)
    unit = multiple * math.gcd(*(m.cost for m in modules))
    _require_possible(budget, fixed, unit, multiple, classes, (multiple, lowest, highest))
    counts = _step_counts(classes, (budget - fixed) // unit, unit // multiple)
    units = {m.name: m.low for m in modules}
    for steps, count in zip(classes, counts, strict=True):
        for name in steps.order[:count]:
            units[name] += 1
    ranks = {name: multiple * n for name, n in units.items()}
    spent = sum(m.cost * ranks[m.name] for m in modules)
    if spent != budget:
        raise VlmtuneError(f"ranks: {spent} of {budget} were spent; this is a bug, please report the costs.")
    return ranks


@dataclass(frozen=True)
class _Module:
    """weight: importance^power relative to the largest; low and high: bounds of rank / multiple."""

    name: str
    position: int
    importance: float
    weight: float
    cost: int
    low: int
    high: int


@dataclass(frozen=True)
class _Steps:
    """The possible steps of modules that cost the same, best first: whatever their number, these are the ones taken.

    order: whose rank goes up by one multiple; gains: by how much the squared distance (in multiples) grows, rising.
    """

    cost: int
    order: list[str]
    gains: np.ndarray


def _modules(
    importance: Mapping[str, float],
    costs: Mapping[str, int] | None,
    limits: Mapping[str, int] | None,
    multiple: int,
    lowest: int,
    highest: int,
    power: float,
) -> list[_Module]:
    if not importance:
        raise VlmtuneError("ranks: there is no module to give a rank to.")
    if not (multiple >= 1 and 1 <= lowest <= highest) or not (math.isfinite(power) and power >= 0):
        raise VlmtuneError(
            f"ranks: multiple {multiple}, lowest {lowest}, highest {highest}, power {power} make no sense together; "
            "the multiple is 1 or more, lowest is from 1 to highest, the power 0 or more."
        )
    wrong = [name for name, value in importance.items() if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise VlmtuneError(f"ranks: the importance of {wrong[0]} is {importance[wrong[0]]}; it is a number from 0 up.")
    greatest = max(importance.values())
    if greatest == 0:
        raise VlmtuneError("ranks: every importance is 0, so there is nothing to follow; use one rank for all.")
    modules = []
    for position, (name, value) in enumerate(importance.items()):
        for given, what in ((costs, "cost"), (limits, "limit")):
            if given is not None and name not in given:
                raise VlmtuneError(f"ranks: {name} has an importance but no {what}; give it one.")
        cost = 1 if costs is None else costs[name]
        if cost < 1 or cost != int(cost):
            raise VlmtuneError(f"ranks: the cost of {name} is {cost}; it is a whole number from 1 up.")
        top = highest if limits is None else min(highest, limits[name])
        low, high = -(-lowest // multiple), top // multiple
        if low > high:
            raise VlmtuneError(
                f"ranks: no multiple of {multiple} from {lowest} to {top} can be the rank of {name}; leave it out of "
                "LoRA, or lower the bounds."
            )
        weight = max(value / greatest, LEAST) ** power
        modules.append(_Module(name, position, value, weight, int(cost), low, high))
    return modules


def _targets(modules: list[_Module], budget: int, multiple: int) -> np.ndarray:
    """float64[modules], in multiples: c x weight cut off at the bounds, with the c that spends the budget.

    What is spent is a rising, piecewise linear function of c, whose corners are known. A budget beyond all bounds ends
    at the bounds.
    """
    weight, cost, low, high = (
        np.array([getattr(m, field) for m in modules], dtype=np.float64) for field in ("weight", "cost", "low", "high")
    )
    corners = np.unique(np.concatenate([low / weight, high / weight]))
    spent = np.array([float(cost @ np.clip(c * weight, low, high)) for c in corners])
    level = np.interp(budget / multiple, spent, corners)
    # rounded, so that importance in another unit gives the same ranks
    return np.clip(level * weight, low, high).round(9)


def _classes(modules: list[_Module], targets: np.ndarray, multiple: int) -> list[_Steps]:
    """One for each cost. A step from n - 1 to n multiples adds (n - t)^2 - (n - 1 - t)^2 = 2 (n - t) - 1."""
    steps = defaultdict(list)
    for module, target in zip(modules, targets, strict=True):
        for n in range(module.low + 1, module.high + 1):
            gain = 2.0 * (n - float(target)) - 1.0
            steps[module.cost].append((gain, -module.importance, module.position, module.name))
    classes = []
    for cost in sorted({m.cost for m in modules}):
        ordered = sorted(steps[cost])
        classes.append(_Steps(cost, [name for *_, name in ordered], np.array([gain for gain, *_ in ordered])))
    return classes


def _require_possible(
    budget: int, fixed: int, unit: int, multiple: int, classes: list[_Steps], bounds: tuple[int, int, int]
) -> None:
    """Refuse a budget that no number of steps spends. The reachable sums are the set bits of one large integer."""
    divisor = unit // multiple
    reachable = 1
    for steps in classes:
        left, chunk = len(steps.order), 1
        while left > 0:  # bounded counts as sums of powers of two and a rest
            taken = min(chunk, left)
            reachable |= reachable << (taken * steps.cost // divisor)
            left, chunk = left - taken, 2 * chunk
    wanted, rest = divmod(budget - fixed, unit)
    if wanted >= 0 and rest == 0 and reachable >> wanted & 1:
        return
    possible = []
    if wanted >= 0:
        possible.append((reachable & ((1 << (wanted + 1)) - 1)).bit_length() - 1)
    above = reachable >> max(0, wanted + 1)
    if above:
        possible.append(max(0, wanted + 1) + (above & -above).bit_length() - 1)
    nearest = " and ".join(str(fixed + n * unit) for n in possible)
    multiple, lowest, highest = bounds
    raise VlmtuneError(
        f"ranks: no ranks that are multiples of {multiple} from {lowest} to {highest} (or to what a module can have) "
        f"cost exactly {budget}; the nearest possible budget{'s are' if len(possible) > 1 else ' is'} {nearest}."
    )


def _step_counts(classes: list[_Steps], budget: int, divisor: int) -> list[int]:
    """How many steps of each class to take, so that they cost `budget` (in units) and the distance is least.

    Steps are taken in the order of distance per cost while they fit; the first that does not fit sets the price of a
    unit. What another choice adds to the distance, less the price of what it spends more, is never negative and adds
    up over classes, so all choices below some such excess can be listed. The limit is doubled until one of them spends
    the rest exactly: no choice beyond the limit can be better.
    """
    costs = [steps.cost // divisor for steps in classes]
    every = sorted(
        (float(gain) / cost, index, cost)
        for index, (steps, cost) in enumerate(zip(classes, costs, strict=True))
        for gain in steps.gains
    )
    taken, rest, price = [0] * len(classes), budget, 0.0
    for ratio, index, cost in every:
        price = ratio
        if cost > rest:
            break
        taken[index], rest = taken[index] + 1, rest - cost
    excess = [_excess(s.gains, n, price * c) for s, n, c in zip(classes, taken, costs, strict=True)]
    limit = 2.0**-10
    while (changes := _cheapest(costs, taken, excess, rest, limit)) is None:
        limit *= 2.0
    return [n + change for n, change in zip(taken, changes, strict=True)]


def _excess(gains: np.ndarray, taken: int, price: float) -> np.ndarray:
    """float64[steps + 1]: for every number of steps, what it adds to the distance beyond the price of its cost."""
    sums = np.concatenate([[0.0], np.cumsum(gains - price)])
    return np.maximum(sums - sums[taken], 0.0)  # rounding may go below 0


def _cheapest(
    costs: list[int], taken: list[int], excess: list[np.ndarray], rest: int, limit: float
) -> list[int] | None:
    """Changes of the numbers of steps that spend `rest` at the least total excess; None if none stays within `limit`.

    Class after class, the reachable sums and the least excess of each are extended by every change within the limit.
    """
    windows = [np.flatnonzero(values <= limit) for values in excess]
    changes = [window - n for window, n in zip(windows, taken, strict=True)]
    # what the classes from number k on can still change: least[k] to most[k]
    least, most = (
        np.cumsum([0, *(cost * int(end(change)) for cost, change in zip(costs[::-1], changes[::-1], strict=True))])[
            ::-1
        ]
        for end in (np.min, np.max)
    )
    sums, totals = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # (state before, change) of every state after each class
    for index, (cost, window, change) in enumerate(zip(costs, windows, changes, strict=True)):
        new_totals = totals[:, None] + excess[index][window]
        new_sums = sums[:, None] + cost * change
        missing = rest - new_sums
        useful = (new_totals <= limit) & (missing >= least[index + 1]) & (missing <= most[index + 1])
        before, which = np.nonzero(useful)
        if not len(before):
            return None
        sums, totals = new_sums[before, which], new_totals[before, which]
        order = np.lexsort((totals, sums))
        order = order[np.concatenate([[True], np.diff(sums[order]) > 0])]  # the cheapest way to each sum
        sums, totals = sums[order], totals[order]
        history.append((before[order], change[which[order]]))
    state, found = 0, []  # the only sum left is `rest`
    for before, change in reversed(history):
        found.append(int(change[state]))
        state = before[state]
    return found[::-1]

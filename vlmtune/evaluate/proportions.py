"""How sure an accuracy is, and the difference of two accuracies on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): sensible for few samples, and for none or all of them."""
    if not count:
        return 0.0, 1.0
    share, square = hits / count, Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(right: Sequence[bool]) -> Estimate:
    """The share of what is right, with Wilson's interval. ValueError of nothing."""
    if not right:
        raise ValueError("an accuracy needs at least one sample")
    return Estimate(sum(right) / len(right), *wilson(sum(right), len(right)))


def difference(one: Sequence[bool], other: Sequence[bool]) -> Estimate:
    """How much more accurate `one` is than `other` on the same samples, in the same order.

    Newcombe's hybrid score interval for paired proportions (Newcombe 1998, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", method 10): the Wilson intervals of the two, joined
    with their correlation. It needs no resampling and is not empty where all agree. ValueError for unequal lengths.
    """
    if len(one) != len(other):
        raise ValueError(f"paired samples: {len(one)} and {len(other)} are not as many")
    p, q = accuracy(one), accuracy(other)
    shared = _correlation(one, other)
    gap = p.value - q.value
    down, up = (p.value - p.low, q.high - q.value), (p.high - p.value, q.value - q.low)
    below, above = (
        math.sqrt(max(0.0, mine**2 - 2 * shared * mine * theirs + theirs**2)) for mine, theirs in (down, up)
    )
    return Estimate(gap, max(-1.0, gap - below), min(1.0, gap + above))


def _correlation(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Phi of the fourfold table, with the continuity correction of method 10; 0 where a margin is empty."""
    count = len(one)
    both = sum(a and b for a, b in zip(one, other, strict=True))
    only_one, only_other = sum(one) - both, sum(other) - both
    neither = count - both - only_one - only_other
    margins = (both + only_one) * (only_other + neither) * (both + only_other) * (only_one + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - only_one * only_other
    if excess > 0:
        excess = max(0.0, excess - count / 2)
    return excess / math.sqrt(margins)

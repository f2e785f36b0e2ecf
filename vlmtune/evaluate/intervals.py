"""95 % intervals: over seeds (Student's t), over held-out samples (bootstrap), of a median (order statistics)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, t

LEVEL = 0.95
DRAWS = 2000
"""Bootstrap resamples: the ends of an interval then move by about a thirtieth of its width between generators."""
_AT_ONCE = 4_000_000  # counts that are held at a time


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; the ends are None where nothing says how sure the value is."""

    value: float
    low: float | None = None
    high: float | None = None


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of independent values; no ends for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """Geometric mean of positive ratios, and the t interval of their logarithms: twice counts as much as half."""
    found = t_interval(np.log(ratios))
    ends = (None if end is None else float(np.exp(end)) for end in (found.low, found.high))
    return Interval(float(np.exp(found.value)), *ends)


def percentile_interval(value: float, draws: np.ndarray) -> Interval:
    """value: of the samples themselves; draws: the same figure of every resample (percentile bootstrap, Efron 1979)."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def median_interval(values: Sequence[float]) -> Interval:
    """Median and its interval between order statistics, which assumes nothing but independence (Conover 1999, §3.2).

    No ends where even the least and the greatest value cover the median less often than wanted (below 6 values).
    """
    ordered = np.sort(values)
    count, middle = len(ordered), float(np.median(ordered))
    rank = int(binom.ppf((1 - LEVEL) / 2, count, 0.5))  # smallest k with P(X <= k) >= 2.5 %
    if binom.cdf(rank, count, 0.5) > (1 - LEVEL) / 2:
        rank -= 1
    if rank < 0:
        return Interval(middle)
    return Interval(middle, float(ordered[rank]), float(ordered[count - 1 - rank]))


def resampled_sums(table: np.ndarray, generator: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """float[draws, K] from float[K, n]: sums over n samples drawn with replacement, the same ones for all K rows."""
    size = table.shape[1]
    step = max(1, _AT_ONCE // size)
    parts = []
    for start in range(0, draws, step):
        counts = generator.multinomial(size, np.full(size, 1 / size), min(step, draws - start))
        parts.append(counts @ table.T)
    return np.concatenate(parts)

"""How sure a difference of paired scores is: bootstrap, sign-flip test, Holm. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 5_000  # of the bootstrap: the ends of a 95% interval then move by a few percent of its width
FLIPS = 9_999  # of the sign-flip test, where not every pattern of signs can be tried: the smallest p is 1e-4


@dataclass(frozen=True)
class Change:
    """The same samples measured twice. before, after: means; low, high: 95% interval of after - before; p: two-sided,
    of "both are equally good"; count: samples."""

    before: float
    after: float
    low: float
    high: float
    p: float
    count: int

    @property
    def difference(self) -> float:
        return self.after - self.before


def paired_change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Change:
    """Compare two measurements of the same samples, in the same order.

    Interval: percentile bootstrap over samples (Efron & Tibshirani 1993, 13.3). p: sign-flip test of the mean, which of
    scores of 0 and 1 is McNemar's exact test; every pattern of signs is tried where there are up to 2^13, else FLIPS
    drawn ones. A pure function of its arguments. ValueError: no samples, or not as many of each.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"a paired change needs the same samples twice, at least one; got {len(before)}, {len(after)}")
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    gained = second - first
    random = np.random.default_rng(seed)
    count = len(gained)
    means = np.concatenate(
        [gained[random.integers(0, count, (part, count))].mean(axis=1) for part in _parts(RESAMPLES, count)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Change(float(first.mean()), float(second.mean()), float(low), float(high), _sign_flip(gained, seed), count)


def _sign_flip(gained: np.ndarray, seed: int) -> float:
    """Two-sided p of a mean of differences that is as likely to be its negative."""
    moved = gained[gained != 0]  # a difference of 0 has no sign to flip
    if not len(moved):
        return 1.0
    sizes = np.abs(moved)
    if np.allclose(sizes, sizes[0], rtol=1e-9):  # McNemar: how often up, of how many that moved
        return float(stats.binomtest(int((moved > 0).sum()), len(moved), 0.5).pvalue)
    found = stats.permutation_test(
        (moved,), np.mean, permutation_type="samples", vectorized=True, n_resamples=FLIPS, batch=256,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(min(1.0, found.pvalue))


def _parts(total: int, width: int) -> list[int]:
    """Rows at a time, so that no table of more than a few million numbers is made."""
    size = max(1, 4_000_000 // width)
    return [min(size, total - start) for start in range(0, total, size)]


def holm(values: Sequence[float]) -> list[float]:
    """p values of several questions at once, raised so that below 0.05 there is one false alarm in twenty of such
    lists (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda n: values[n])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, n in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[n]))
        adjusted[n] = highest
    return adjusted

"""Intervals against scipy's own, and what resampling may never do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vlmtune.evaluate.intervals import (
    Interval,
    median_interval,
    percentile_interval,
    ratio_interval,
    resampled_sums,
    t_interval,
)

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


@given(NUMBERS)
def test_student_as_scipy_has_it(values):
    found = t_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    scale = 1e-9 * max(1.0, *map(abs, values))  # the same formula in another order of additions
    if np.ptp(values) > 1e-6:
        assert (found.low, found.high) == (pytest.approx(low, abs=scale), pytest.approx(high, abs=scale))
    assert found.value == pytest.approx(np.mean(values), abs=scale)


def test_one_value_says_nothing_about_its_spread():
    assert t_interval([3.0]) == Interval(3.0)
    assert ratio_interval([2.0]) == Interval(pytest.approx(2.0))


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_a_ratio_turned_round_has_the_interval_turned_round(ratios):
    one, other = ratio_interval(ratios), ratio_interval([1 / ratio for ratio in ratios])
    assert one.value == pytest.approx(1 / other.value) and one.value == pytest.approx(stats.gmean(ratios))
    assert one.low == pytest.approx(1 / other.high) and one.high == pytest.approx(1 / other.low)


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=60, unique=True))
def test_the_median_lies_between_the_order_statistics_that_scipy_chooses(values):
    found = median_interval(values)
    reference = stats.quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    assert found == Interval(float(np.median(values)), reference.low, reference.high)


def test_the_median_interval_holds_what_it_promises():
    """Of 2000 samples of an exponential 95 % or more cover its median; the ranks are whole, so a little more."""
    generator = np.random.default_rng(1)
    for size in (6, 11, 40):
        hits = 0
        for sample in generator.exponential(size=(2000, size)):
            found = median_interval(sample)
            hits += found.low <= np.log(2) <= found.high
        assert hits / 2000 > 0.94  # 95 % less two standard errors


def test_five_values_are_too_few_for_a_median_interval():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 100.0]) == Interval(3.0)


def test_the_bootstrap_as_scipy_has_it():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    draws = resampled_sums(values[None], np.random.default_rng(1), 20_000)[:, 0] / len(values)
    found = percentile_interval(float(values.mean()), draws)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    width = found.high - found.low
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.03 * width)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10))
def test_rows_are_resampled_together(size, rows, seed):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size)
    table = np.stack([*(k * values for k in range(1, rows + 1)), np.ones(size)])
    sums = resampled_sums(table, generator, 50)
    assert sums.shape == (50, rows + 1) and np.allclose(sums[:, -1], size)
    for k in range(rows):
        assert np.allclose(sums[:, k], (k + 1) * sums[:, 0])
    assert (sums[:, 0] <= size * values.max() + 1e-9).all() and (sums[:, 0] >= size * values.min() - 1e-9).all()


def test_large_data_is_resampled_in_parts():
    """The parts together are as many draws as were asked for."""
    table = np.ones((2, 100_000))
    assert resampled_sums(table, np.random.default_rng(0), 90).shape == (90, 2)

"""Intervals and tests of paired scores, against scipy and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlmtune.evaluate.paired import holm, paired_change

SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20)


def test_the_interval_is_that_of_scipy():
    """Both draw resamples of their own: ends differ by the noise of 5,000 draws, some percent of the width."""
    random = np.random.default_rng(0)
    before, after = random.uniform(size=80), random.uniform(size=80) + 0.1
    ours = paired_change(before, after)
    theirs = stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)
    assert ours.difference == pytest.approx(float(np.mean(after - before)))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 data sets of 60 samples that are right or wrong before and after, 0.1 more often right: 95% would be 380. 400
    draws have a standard deviation of 4.4, and the percentile bootstrap of 60 is a little narrow (about 94%, 376)."""
    random = np.random.default_rng(2)
    hits = 0
    for seed in range(400):
        gained = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=60)
        change = paired_change(np.zeros(60), gained, seed=seed)
        hits += change.low <= 0.1 <= change.high
    assert 363 <= hits <= 393


def test_p_of_right_and_wrong_is_mcnemar():
    """9 of 40 samples changed, 8 of them for the worse: 2 * (1 + 9) / 2^9."""
    before = [1.0] * 8 + [0.0] + [1.0] * 31
    after = [0.0] * 8 + [1.0] + [1.0] * 31
    change = paired_change(before, after)
    assert change.p == pytest.approx(20 / 512)
    assert change.p == pytest.approx(stats.binomtest(8, 9).pvalue)
    assert (change.before, change.after, change.count) == (39 / 40, 32 / 40, 40)


def test_p_of_graded_scores_is_that_of_all_signs():
    """Enumerated here: how many of the 2^8 patterns of signs give a mean as far from 0."""
    gained = np.array([0.3, 0.1, -0.2, 0.5, 0.05, 0.4, -0.01, 0.2])
    patterns = [np.dot(signs, gained) for signs in itertools.product((-1, 1), repeat=8)]
    expected = np.mean([abs(total) >= abs(gained.sum()) - 1e-12 for total in patterns])
    assert paired_change(np.zeros(8), gained).p == pytest.approx(expected)


def test_p_of_many_graded_scores_is_near_that_of_the_t_test():
    """200 symmetric differences: the sign-flip test and the t-test agree; 9,999 draws leave a noise of 0.005."""
    random = np.random.default_rng(3)
    gained = random.normal(0.12, 1.0, size=200)
    expected = stats.ttest_1samp(gained, 0.0).pvalue
    assert paired_change(np.zeros(200), gained).p == pytest.approx(expected, abs=0.02)


def test_nothing_changed_is_no_evidence():
    change = paired_change([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])
    assert (change.difference, change.low, change.high, change.p) == (0.0, 0.0, 0.0, 1.0)


@settings(deadline=None, max_examples=25)
@given(SCORES)
def test_turning_time_round_turns_the_change_round(pairs):
    before, after = zip(*pairs, strict=True)
    there, back = paired_change(before, after), paired_change(after, before)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert 0 < there.p <= 1 and there.low - 1e-9 <= there.difference <= there.high + 1e-9


def test_unequal_or_no_samples_are_refused():
    for before, after in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="same samples twice"):
            paired_change(before, after)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []

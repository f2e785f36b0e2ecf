"""Intervals against scipy, McNemar's test, and how often they hold what is true (A7)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from vlmtune.evaluate.proportions import accuracy, difference, wilson

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_is_scipys(drawn):
    hits, count = drawn
    found = accuracy([True] * hits + [False] * (count - hits))
    theirs = binomtest(hits, count).proportion_ci(method="wilson")
    assert found.value == hits / count
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@given(OUTCOMES)
def test_a_difference_is_in_its_interval_and_turns_round(pairs):
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    found, back = difference(one, other), difference(other, one)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-12)


def test_of_independent_samples_it_is_newcombes_unpaired_interval():
    """Without correlation the two Wilson intervals are joined at right angles: his method for unpaired samples."""
    one = [True] * 40 + [False] * 40
    other = ([True] * 10 + [False] * 30) * 2
    p, q, found = accuracy(one), accuracy(other), difference(one, other)
    assert found.low == pytest.approx(0.25 - np.hypot(p.value - p.low, q.high - q.value))
    assert found.high == pytest.approx(0.25 + np.hypot(p.high - p.value, q.value - q.low))


def test_agreement_narrows_it():
    """Fewer samples answered differently: the same difference is surer."""
    one = [True] * 60 + [False] * 40
    alike, mixed = [True] * 50 + [False] * 50, [False] * 35 + [True] * 25 + [False] * 15 + [True] * 25
    assert sum(mixed) == sum(alike)
    near, far = difference(one, alike), difference(one, mixed)
    assert near.value == far.value and near.low > 0 > far.low


@pytest.mark.parametrize("count", [20, 160])
def test_it_says_what_mcnemars_test_says(count):
    """Its mid-p version (Fagerland et al. 2013), at every table with p clearly on one side of 0.05: the score interval
    is another approximation, so that between 0.02 and 0.1 they may differ."""
    draw, compared = np.random.default_rng(count), 0
    for _ in range(300):
        shares = draw.dirichlet([4, 1, 1, 4])
        both, gained, lost, neither = draw.multinomial(count, shares)
        if gained + lost == 0:
            continue
        one = [True] * both + [True] * gained + [False] * lost + [False] * neither
        other = [True] * both + [False] * gained + [True] * lost + [False] * neither
        changed = int(gained + lost)
        p = binomtest(int(gained), changed).pvalue - binom.pmf(int(gained), changed, 0.5)
        found = difference(one, other)
        if not 0.02 < p < 0.1:
            assert (found.low > 0 or found.high < 0) == (p < 0.05), (both, gained, lost, neither)
            compared += 1
    assert compared > 200


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.1, 0.2), (0.1, 0.6, 0.02, 0.28), (0.85, 0.1, 0.0, 0.05)])
def test_it_holds_the_truth_in_about_95_of_100(shares):
    """2000 draws of 60 samples: the standard error of a coverage of .95 is .005; score intervals are a bit cautious."""
    draw = np.random.default_rng(1)
    truth, held = shares[1] - shares[2], 0
    for _ in range(2000):
        both, gained, lost, neither = draw.multinomial(60, shares)
        one = [True] * (both + gained) + [False] * (lost + neither)
        other = [True] * both + [False] * gained + [True] * lost + [False] * neither
        found = difference(one, other)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 2000 <= 0.995


def test_nothing_has_no_accuracy():
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])
    with pytest.raises(ValueError, match="not as many"):
        difference([True], [True, False])

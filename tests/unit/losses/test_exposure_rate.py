"""The three decays of Bengio et al. 2015 against their closed forms."""

from __future__ import annotations

import math

import pytest

from vlmtune.losses.exposure import ExposureRate

CLOSED = {
    "linear": (0.0, lambda x: 1 - x),
    "exponential": (0.05, lambda x: math.exp(x * math.log(0.05))),
    "inverse_sigmoid": (12.0, lambda x: 1 / (1 + math.exp(100 * x / 12 - math.log(12)))),
}


@pytest.mark.parametrize("decay", CLOSED)
def test_rates_follow_the_closed_form_of_teacher_forcing(decay):
    k, forced = CLOSED[decay]
    rate = ExposureRate(decay, 0.4, 0.2, k)
    for progress in (0.2, 0.3, 0.6, 1.0):
        assert rate(progress) == pytest.approx(0.4 * (1 - forced((progress - 0.2) / 0.8)), abs=1e-12)
    assert rate(0.0) == rate(0.199) == 0.0
    values = [rate(0.2 + 0.08 * n) for n in range(11)]
    assert values == sorted(values) and 0.35 < values[-1] <= 0.4

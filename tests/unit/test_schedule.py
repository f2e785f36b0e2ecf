"""Schedules and lengths against what they say in words, and the cosine against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import Length, cosine_with_warmup, piecewise


def test_a_number_holds_throughout():
    assert {piecewise(0.25)(p / 10) for p in range(11)} == {0.25}


def test_each_value_holds_until_the_next_boundary():
    value = piecewise([[0, 1], [0.3, 0.5], [1, 7]])
    assert [value(p) for p in (0, 0.299, 0.3, 0.999, 1.0)] == [1, 1, 0.5, 0.5, 7]


@pytest.mark.parametrize(
    "points", [[], [[0.1, 1]], [[0, 1], [0.5, 2], [0.4, 3]], [[0, 1], [1.5, 2]], [[0, 1], [0, 2]], [[0, math.nan]]]
)
def test_impossible_boundaries_are_refused(points):
    with pytest.raises(VlmtuneError, match="start at 0, rise"):
        piecewise(points)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500", 500, "steps"),
        (500, 500, "steps"),
        (12.0, 12, "steps"),
        ("1 step", 1, "steps"),
        ("3 epochs", 3, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.5epochs", 0.5, "epochs"),
        ("20000 samples", 20000, "samples"),
        (" 5 % ", 5, "%"),
        ("3%", 3, "%"),
        (".5%", 0.5, "%"),
    ],
)
def test_lengths_are_parsed(text, amount, unit):
    assert Length.parse(text) == Length(amount, unit)


@pytest.mark.parametrize("text", ["", "steps", "-5 steps", "5 miles", "1e3", "nan", "5 steps 3", None, "5,000 steps"])
def test_what_is_no_length_is_refused_with_the_text_and_a_remedy(text):
    with pytest.raises(VlmtuneError, match="write a number of steps") as caught:
        Length.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10 steps", 10),
        ("2 epochs", 26),  # 2 * 100 / 8 = 25 -> whole steps below
        ("100 samples", 13),
        ("96 samples", 12),
        ("10%", 5),
        ("3%", 2),
        ("0 steps", 0),
    ],
)
def test_units_become_whole_steps_rounded_up(text, steps):
    assert Length.parse(text).steps(samples_per_step=8, samples_per_epoch=104, total=50) == steps


@given(percent=st.integers(0, 100), total=st.integers(1, 10_000))
def test_a_percentage_is_exact_where_it_is_whole(percent, total):
    steps = Length.parse(f"{percent}%").steps(1, None, total)
    assert steps == -(-total * percent // 100)


def test_units_without_meaning_are_refused():
    with pytest.raises(VlmtuneError, match="a share needs a total"):
        Length.parse("3%").steps(8, 100)
    with pytest.raises(VlmtuneError, match="a source without end has no epochs"):
        Length.parse("1 epochs").steps(8, None)


def test_warmup_rises_linearly_and_reaches_one():
    factors = [cosine_with_warmup(step, 100, 4, 0.1) for step in range(5)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0  # the cosine starts at its top


def test_the_last_step_is_at_the_floor():
    for total, warmup, floor in ((100, 4, 0.1), (10, 0, 0.0), (2, 1, 0.5), (1000, 30, 0.02)):
        last = floor if total > warmup + 1 else 1.0
        assert cosine_with_warmup(total - 1, total, warmup, floor) == pytest.approx(last)


def test_a_run_of_one_step_uses_the_full_rate():
    assert cosine_with_warmup(0, 1, 0, 0.1) == 1.0


@given(total=st.integers(3, 300), share=st.floats(0, 0.9), floor=st.floats(0, 1))
def test_factors_stay_between_floor_and_one_and_never_rise_after_warmup(total, share, floor):
    warmup = int(share * (total - 2))
    factors = [cosine_with_warmup(step, total, warmup, floor) for step in range(total)]
    assert all(0 < f <= 1 + 1e-12 or f == pytest.approx(floor, abs=1e-12) for f in factors)
    after = factors[warmup:]
    assert all(high >= low - 1e-12 for high, low in zip(after, after[1:], strict=False))
    assert min(after) >= floor - 1e-12


def test_the_cosine_is_torchs():
    """Second source: CosineAnnealingLR from 1 to the floor over the steps after warmup."""
    total, warmup, floor = 40, 5, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 1 - warmup, eta_min=floor)
    expected = []
    for _ in range(warmup, total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [cosine_with_warmup(step, total, warmup, floor) for step in range(warmup, total)]
    assert ours == pytest.approx(expected, abs=1e-9)  # torch applies its recursion, which rounds differently

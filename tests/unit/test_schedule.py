"""Schedules and lengths against what they say in words, and the cosine against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import (
    Length,
    Piecewise,
    Rate,
    Stretch,
    constant_with_warmup,
    cosine_with_warmup,
    first_reaching,
    learning_rates,
    linear_with_warmup,
    piecewise,
    staged,
    warmup_stable_decay,
)


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


@given(total=st.integers(2, 300), data=st.data(), floor=st.floats(0, 1))
def test_the_line_is_torchs(total, data, floor):
    """LinearLR from 1 to the floor, after the warmup; both are in float64: 1e-12."""
    warmup = data.draw(st.integers(0, total - 2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    line = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, max(floor, 1e-9), total - 1 - warmup)
    for step in range(warmup, total):
        ours = linear_with_warmup(step, total, warmup, max(floor, 1e-9))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        line.step()


def test_warmup_stable_decay_has_three_parts():
    factors = [warmup_stable_decay(step, 20, 4, 5, 0.1) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[3:15]) == {1.0}
    assert factors[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_a_constant_rises_once():
    assert [constant_with_warmup(step, 2) for step in range(4)] == [0.5, 1, 1, 1]
    assert constant_with_warmup(0, 0) == 1


def test_stages_from_1e_6_over_2e_4_to_1e_5():
    """SPEC D2: the handbook's three parts; each ends where it says, and none makes a step twice."""
    parts = [
        Stretch(1e-6, 2e-4, 10, "linear"),
        Stretch(2e-4, 2e-4, 20, "linear"),
        Stretch(2e-4, 1e-5, 10, "cosine"),
    ]
    lr = [2e-4 * staged(step, parts, 2e-4) for step in range(45)]
    assert lr[0] == pytest.approx(1e-6 + 1.99e-5) and lr[9] == pytest.approx(2e-4)
    assert lr[9:30] == pytest.approx([2e-4] * 21)
    assert lr[34] == pytest.approx((2e-4 + 1e-5) / 2)  # half a cosine is half way at its middle
    assert lr[39] == pytest.approx(1e-5) and lr[40:] == pytest.approx([1e-5] * 5)
    assert all(a > b for a, b in zip(lr[29:40], lr[30:40], strict=False))


@pytest.mark.parametrize("value", [0, -1e-4, [[0, 0], [0.5, 0]], [[0, 1e-4], [0.5, -1e-5]]])
def test_learning_rates_that_train_nothing_are_refused(value):
    with pytest.raises(VlmtuneError, match="one must be above it"):
        learning_rates(value)


def rate(over: Piecewise, warmup: int = 0, total: int = 100) -> Rate:
    return Rate(lambda step: 1.0, over, warmup, total)


def test_unfreezing_starts_at_its_step_with_its_own_warmup():
    """SPEC F1: frozen to 50 %, full to 80 %, a tenth from there on."""
    own = rate(piecewise([[0, 0], [0.5, 1.0], [0.8, 0.1]]), warmup=4)
    assert own.phases == [0, 50]
    assert [own.factor(step) for step in (0, 49)] == [0, 0]
    assert [own.factor(step) for step in (50, 51, 52, 53, 54)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert own.factor(79) == 1.0 and own.factor(80) == pytest.approx(0.1)
    assert [own.is_active(step) for step in (0, 49, 50, 99)] == [False, False, True, True]


def test_what_trains_from_the_start_has_no_second_warmup():
    assert [rate(piecewise(1.0), warmup=5).factor(step) for step in range(3)] == [1, 1, 1]


def test_what_is_frozen_again_warms_up_again():
    own = rate(piecewise([[0, 1.0], [0.2, 0], [0.4, 0.5]]), warmup=2)
    assert own.phases == [0, 20, 40]
    assert [own.factor(step) for step in (19, 20, 39, 40, 41)] == [1, 0, 0, 0.25, 0.5]


@given(start=st.floats(0, 1), total=st.integers(1, 5000))
def test_the_first_step_is_the_first_that_sees_the_value(start, total):
    """In the arithmetic of the step itself: step / total."""
    first = first_reaching(start, total)
    assert all(step / total < start for step in range(max(0, first - 2), first))
    assert first == total or first / total >= start

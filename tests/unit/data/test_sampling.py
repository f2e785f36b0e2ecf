"""Which task every sample has: the three limits of temperature, shares, epochs, and what a resume needs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.sampling import TemperatureOrder, every_task, grouped, pools_of, temperature_shares
from vlmtune.errors import VlmtuneError

A, B, C = "caption", "ocr", "vqa"
MIXED = [[A, B, A, A, C, A], [B, B, A]]  # tasks of the rows of two files


def mixed():
    return pools_of(MIXED, [6, 3])


def tasks_of(order, k):
    source, row = order[k]
    return MIXED[source][row]


losses = st.lists(st.floats(1e-3, 50), min_size=1, max_size=6)


@given(losses)
def test_the_three_limits(values):
    values = np.array(values)
    np.testing.assert_allclose(temperature_shares(values, 1.0), values / values.sum(), rtol=1e-12)
    np.testing.assert_allclose(temperature_shares(values, 1e9), 1 / len(values), rtol=1e-6)
    np.testing.assert_allclose(temperature_shares(values, float("inf")), 1 / len(values), rtol=1e-12)
    worst = values == values.max()
    np.testing.assert_allclose(temperature_shares(values, 0.0), worst / worst.sum(), rtol=1e-12)


def test_a_low_temperature_goes_to_the_worst_task_and_never_overflows():
    np.testing.assert_allclose(temperature_shares([1.0, 2.0, 4.0], 1e-3), [0, 0, 1], atol=1e-200)
    np.testing.assert_allclose(temperature_shares([1.0, 2.0, 4.0], 0.5), np.array([1, 4, 16]) / 21)
    np.testing.assert_allclose(temperature_shares([0.0, 0.0], 1.0), [0.5, 0.5])
    np.testing.assert_allclose(temperature_shares([0.0, 3.0], 1.0), [0, 1])


@pytest.mark.parametrize(("values", "temperature"), [([-1.0, 2.0], 1.0), ([float("nan")], 1.0), ([1.0], -1.0)])
def test_what_is_no_loss_or_temperature_is_refused(values, temperature):
    with pytest.raises(VlmtuneError, match="neither may be below 0"):
        temperature_shares(values, temperature)


def test_every_batch_has_every_task():
    order = every_task(mixed(), 30, 4, seed=1)
    for step in range(30):
        counts = Counter(tasks_of(order, k) for k in range(4 * step, 4 * step + 4))
        assert set(counts) == {A, B, C} and max(counts.values()) <= 2
    whole = Counter(tasks_of(order, k) for k in range(120))
    assert set(whole.values()) == {40}


def test_a_batch_too_small_for_all_tasks_is_refused():
    with pytest.raises(VlmtuneError, match=r"a batch of 2 cannot hold 3 tasks \(caption, ocr, vqa\); raise"):
        every_task(mixed(), 3, 2, seed=1)


def test_a_grouped_batch_has_one_task_and_nine_batches_are_three_epochs():
    order = grouped(mixed(), 9, 3, seed=1)
    batches = [{tasks_of(order, k) for k in range(3 * step, 3 * step + 3)} for step in range(9)]
    assert all(len(batch) == 1 for batch in batches)
    assert len({tuple(batch) for batch in batches[:3]}) >= 2, "evenly spread, not one task after the other"
    drawn = Counter(order[k] for k in range(27))
    assert len(drawn) == 9 and set(drawn.values()) == {3}


def test_endless_tasks_are_grouped_equally():
    order = grouped(pools_of([[A], [B]], [None, None]), 10, 2, seed=1)
    assert order.counts(20) == [10, 10]
    assert [order[k][1] for k in range(20) if order[k][0] == 0] == list(range(10))


def test_a_task_walks_all_of_its_rows_once_per_epoch():
    order = every_task(mixed(), 45, 3, seed=1)
    captions = [order[k] for k in range(135) if tasks_of(order, k) == A]
    epochs = [captions[n : n + 5] for n in range(0, 45, 5)]
    assert all(sorted(epoch) == [(0, 0), (0, 2), (0, 3), (0, 5), (1, 2)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3, "every epoch has an order of its own"


def test_a_task_with_an_endless_source_takes_its_sources_in_turn():
    order = every_task(pools_of([[A], [A, A, A]], [None, 3]), 12, 1, seed=0)
    assert [order[k][0] for k in range(12)] == [0, 1] * 6
    assert [order[k][1] for k in range(0, 12, 2)] == list(range(6))
    assert sorted(order[k][1] for k in (1, 3, 5)) == [0, 1, 2]


def simulated(order: TemperatureOrder, start: int, stop: int) -> None:
    """Tasks that fall at different rates."""
    for step in range(start, stop):
        order.decide(step * 4)
        present = {tasks_of(order, k) for k in range(4 * step, 4 * step + 4)}
        order.observe({task: 5.0 * 0.99 ** (step * (1 + "cov".index(task[0]))) for task in present})


@settings(max_examples=25, deadline=None)
@given(killed=st.integers(1, 39), every=st.integers(1, 9), temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]))
def test_a_resume_goes_on_as_if_nothing_had_been(killed, every, temperature):
    arguments = (mixed(), 40, 4, 7, temperature, every)
    whole = TemperatureOrder(*arguments)
    simulated(whole, 0, 40)
    first = TemperatureOrder(*arguments)
    simulated(first, 0, killed)
    again = TemperatureOrder(*arguments)
    again.restore(json.loads(json.dumps(first.state())))  # as a checkpoint holds it
    simulated(again, killed, 40)
    assert [again[k] for k in range(160)] == [whole[k] for k in range(160)]
    assert again.state() == whole.state()


def test_shares_follow_losses():
    order = TemperatureOrder(mixed(), 2_000, 4, 0, 1.0, 1_000)
    assert order.decide(0) == 4_000 and set(order.shares.values()) == {1 / 3}
    order.observe({A: 1.0, B: 2.0})
    order.observe({C: 5.0})
    assert order.decide(4_000) == 8_000 and order.shares == pytest.approx({A: 0.125, B: 0.25, C: 0.625})
    drawn = Counter(tasks_of(order, k) for k in range(4_000, 8_000))
    for task, share in order.shares.items():  # four standard deviations of 4,000 draws
        assert abs(drawn[task] / 4_000 - share) < 4 * (share * (1 - share) / 4_000) ** 0.5
    before = order.shares
    order.observe({A: 11.0})
    assert order.state()["losses"][A] == pytest.approx(0.9 * 1 + 0.1 * 11)
    assert order.shares == before, "a stretch that is decided never changes"


def test_what_is_not_decided_has_no_answer():
    order = TemperatureOrder(mixed(), 10, 4, 0, 1.0, 2)
    with pytest.raises(IndexError):
        order[0]
    order.decide(0)
    with pytest.raises(IndexError, match="only 8 are"):
        order[8]
    with pytest.raises(IndexError):
        order.counts(9)

"""Active sampling: shares and draws, what is remembered of a row, who is suspected, what a resume needs."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmtune.data.active import ActiveOrder, Records, resample, shares
from vlmtune.errors import VlmtuneError

A, B = "caption", "vqa"
TASKS = [[A, B, A, A], [B, B]]  # of the rows of two files
LOW, HIGH = 0.1, 3.0  # losses of a token that is known, and of one that is not


def told(order, loss_of, upto=None):
    """Observe every sample that is decided, with the loss that `loss_of` says for its place."""
    samples = [(k, loss_of(order[k]), loss_of(order[k])) for k in range(order._newest, upto or order._decided)]
    order.observe({}, samples)


difficulties = arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 50))


@given(difficulties, st.floats(0.01, 1.0))
def test_shares_add_up_and_every_row_keeps_the_floor(difficulty, floor):
    found = shares(difficulty, floor)
    assert found.sum() == pytest.approx(1) and found.min() >= floor / len(difficulty) * (1 - 1e-12)
    if difficulty.sum() > 0:
        expected = floor / len(difficulty) + (1 - floor) * (difficulty / difficulty.sum())
        np.testing.assert_allclose(found, expected)
    else:
        np.testing.assert_allclose(found, 1 / len(difficulty))


@pytest.mark.parametrize(
    ("difficulty", "floor"), [([1.0, -1.0], 0.5), ([math.nan, 1.0], 0.5), ([1.0, 1.0], 0.0), ([1.0, 1.0], 1.5)]
)
def test_what_gives_no_shares_is_refused(difficulty, floor):
    with pytest.raises(VlmtuneError, match="no shares"):
        shares(np.array(difficulty), floor)


@given(difficulties, st.floats(0.05, 1.0), st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=60)
def test_every_row_comes_as_often_as_its_share_says(difficulty, floor, count, seed):
    parts = shares(difficulty, floor)
    rows = resample(parts, count, np.random.default_rng(seed))
    assert len(rows) == count
    drawn = np.bincount(rows, minlength=len(parts))
    assert (np.abs(drawn - count * parts) < 1 + 1e-6).all()


def test_draws_are_unbiased():
    parts = shares(np.array([0.0, 1.0, 2.0, 5.0, 0.5]), 0.3)
    rng = np.random.default_rng(0)
    drawn = sum(np.bincount(resample(parts, 3, rng), minlength=5) for _ in range(4000))
    np.testing.assert_allclose(drawn / 12000, parts, atol=0.01)


def test_records_remember_losses_and_forgetting():
    records = Records.empty(3)
    for stretch, (loss, known) in enumerate([(3.0, False), (0.2, True), (0.2, True), (2.0, False), (0.1, True)]):
        records.observe(np.array([1]), np.array([loss]), np.array([known]), stretch)
    assert records.first[1] == 3 and records.last[1] == pytest.approx(0.1)
    assert records.running[1] == pytest.approx(((((3 + 0.2) / 2 + 0.2) / 2 + 2) / 2 + 0.1) / 2)
    assert records.seen.tolist() == [0, 5, 0] and records.forgotten.tolist() == [0, 1, 0]
    assert records.known[1] and records.ever[1] and not records.ever[0]


def test_a_row_that_a_step_has_twice_counts_once():
    records = Records.empty(2)
    records.observe(np.array([0, 1, 0]), np.array([1.0, 5.0, 3.0]), np.array([True, True, False]), 0)
    records.observe(np.array([0]), np.array([2.0]), np.array([True]), 0)
    assert records.seen.tolist() == [1, 1] and records.first.tolist() == [2, 5]
    assert records.forgotten.tolist() == [0, 0]


def test_counters_do_not_overflow():
    records = Records.empty(1)
    for stretch in range(600):
        records.observe(np.array([0]), np.array([1.0]), np.array([stretch % 2 == 0]), stretch)
    assert records.seen[0] == 255 and records.forgotten[0] == 255


def test_difficulty_by_each_measure_and_means_of_groups():
    group = np.array([0, 0, 0, 1, 1, 2])
    records = Records.empty(6)
    records.observe(np.array([0, 1, 3]), np.array([4.0, 2.0, 1.0]), np.array([False, True, True]), 0)
    np.testing.assert_allclose(records.difficulty("loss", group), [4, 2, 3, 1, 1, 7 / 3])
    np.testing.assert_allclose(records.difficulty("accuracy", group), [1, 0.1, 0.55, 0.1, 0.1, 0.4])
    np.testing.assert_allclose(records.difficulty("forgetting", group), [1, 0, 0.5, 0, 0, 1 / 3])
    records.observe(np.array([1]), np.array([2.0]), np.array([False]), 1)
    assert records.difficulty("forgetting", group)[1] == 1, "it was known, and forgotten once"
    np.testing.assert_allclose(Records.empty(4).difficulty("loss", np.zeros(4, int)), 1)


def order_of(steps=24, batch=4, every=3, **wish):
    return ActiveOrder(TASKS, steps, batch, seed=7, every=every, **wish)


def test_the_first_stretch_is_uniform_and_later_ones_follow_the_weak_rows():
    order = order_of(steps=60, floor=0.2, guards=False)
    assert order.decide(0) == 12
    assert set(Counter(order[k] for k in range(12)).values()) == {2}, "6 rows, 12 draws"
    assert order.told == {} and order.shares == {A: 0.5, B: 0.5}
    while order._decided < len(order):
        told(order, lambda place: HIGH if place == (0, 2) else LOW)
        order.decide(order._decided)
    drawn = Counter(order[k] for k in range(12, 240))
    others = [drawn[place] for place in drawn if place != (0, 2)]
    assert len(drawn) == 6 and drawn[0, 2] > 4 * max(others) and min(others) >= 228 * 0.2 / 6 - 6
    assert order.told["difficulty"][A] > order.told["difficulty"][B] and order.shares[A] > 0.7
    assert order.told["known"] == {A: pytest.approx(2 / 3), B: 1.0} and order.told["hardest"] > 0.5
    assert order.told["forgotten"] == {A: 0.0, B: 0.0} and order.told["suspects"] == 1


def test_a_floor_of_one_is_uniform_whatever_was_seen():
    order = order_of(floor=1.0)
    for _ in range(8):
        order.decide(order._decided)
        told(order, lambda place: HIGH if place == (1, 1) else LOW)
    assert set(Counter(order[k] for k in range(96)).values()) == {16}


def test_counts_and_what_is_not_decided():
    order = order_of()
    order.decide(0)
    assert sum(order.counts(7)) == 7 and order.counts(12) == [8, 4]
    with pytest.raises(IndexError, match="sample 12 is not decided yet: only 12 are"):
        order[12]
    with pytest.raises(IndexError, match="not decided"):
        order.counts(13)


def test_losses_that_are_not_finite_are_passed_over():
    order = order_of()
    order.decide(0)
    order.observe({}, [(0, math.nan, math.nan), (1, math.inf, math.inf), (2, 1.0, 1.0)])
    assert order.records.seen.sum() == 1 and np.isfinite(order.records.running).all()
    order.observe({}, [(0, math.nan, 0.0)])
    assert order.records.seen.sum() == 1


@pytest.mark.parametrize("measure", ["loss", "accuracy", "forgetting"])
@pytest.mark.parametrize("cut", [8, 12, 30])
def test_a_restored_order_goes_on_exactly(measure, cut):
    def loss_of(place):
        return LOW + 0.9 * place[1] + (place[0] == 1)

    def walk(order, first, last):
        for k in range(first, last):
            order.decide(k)
            order.observe({}, [(k, loss_of(order[k]) / (1 + k / 9), loss_of(order[k]) / (1 + k / 9))])

    whole = order_of(measure=measure)
    walk(whole, 0, len(whole))
    half = order_of(measure=measure)
    walk(half, 0, cut)
    state = half.state()
    plain = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    walk(half, cut, cut + 5)  # what comes after the checkpoint must not reach it
    again = order_of(measure=measure)
    again.restore(json.loads(json.dumps(plain)) | tensors)
    walk(again, cut, len(again))
    assert [again[k] for k in range(cut, 96)] == [whole[k] for k in range(cut, 96)]
    assert again.counts(96) == whole.counts(96) and again.counts(cut) == whole.counts(cut)
    assert again.told == whole.told and again.shares == whole.shares
    if cut == 30:  # of what came before the stretch at hand there is nothing but counts
        with pytest.raises(IndexError):
            again.counts(23)


def test_a_run_of_one_stretch_is_told_that_it_never_looks():
    found = order_of(steps=3).finding()
    assert found.level == "warn" and "the run has only 3: all of it is drawn uniformly" in found.evidence
    assert order_of(steps=4).finding().level == "pass"


def test_a_state_of_other_data_is_refused():
    order = order_of()
    order.decide(0)
    with pytest.raises(VlmtuneError, match="remembers 6 rows and data.train has 2"):
        ActiveOrder([[A, A]], 24, 4, seed=7).restore(order.state())


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_wrong_labels_are_suspected_and_hard_samples_are_not(noise):
    """A simulated run: easy rows, hard ones whose loss falls as their like is trained on, and wrong labels, which are
    learned by heart slowly. A stretch has 6 rows of 10."""
    rng = np.random.default_rng(0)
    size = 600
    wrong = rng.random(size) < noise
    hard = ~wrong & (rng.random(size) < 0.2)
    start = np.where(wrong, rng.uniform(2, 5, size), np.where(hard, rng.uniform(2, 8, size), rng.uniform(0, 0.3, size)))
    visits, late = np.zeros(size), np.zeros(size)
    order = ActiveOrder([["vqa"] * size], 60, 60, seed=1, every=6)
    for k in range(len(order)):
        order.decide(k)
        row = order[k][1]
        learned = 0.5 ** (k / 1200) * 0.75 ** visits[row] if hard[row] else 0.93 ** visits[row]
        loss = start[row] * learned * rng.uniform(0.9, 1.1)
        order.observe({}, [(k, loss, loss)])
        visits[row] += 1
        late[row] += k >= len(order) // 2
    found = np.zeros(size, bool)
    found[[suspect.row for suspect in order.suspects()]] = True
    if noise:
        assert wrong[found].mean() > 0.9 and found[wrong].mean() > 0.7
        assert np.median(late[wrong]) < np.median(late[hard]), "they are not chased"
    else:
        assert found.sum() <= 0.02 * size
    losses = [suspect.last for suspect in order.suspects()]
    assert losses == sorted(losses, reverse=True) and all(s.seen >= 3 for s in order.suspects())


def test_nobody_is_suspected_before_some_stretches_or_below_the_loss_of_a_known_token():
    group = np.zeros(20, int)
    records = Records.empty(20)
    losses = np.array([0.01] * 18 + [5.0, 0.5])
    for stretch in (0, 0, 1, 1, 2):
        records.observe(np.arange(20), losses, losses < 0.69, stretch)
    assert not records.suspects(group).any()
    records.observe(np.arange(20), losses, losses < 0.69, 4)
    assert np.flatnonzero(records.suspects(group)).tolist() == [18]
    records.observe(np.array([18]), np.array([1.0]), np.array([False]), 5)
    assert not records.suspects(group).any(), "it fell after all"

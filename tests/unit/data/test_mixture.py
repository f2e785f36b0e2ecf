"""Which sample is number k: pure, in the right shares, every row once per epoch."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.mixture import Mixture, _piecewise_shares
from vlmtune.errors import VlmtuneError
from vlmtune.schedule import piecewise


def mixture(sizes, weights, total, seed=0) -> Mixture:
    return Mixture(sizes, [piecewise(weight) for weight in weights], total, seed)


def order(mix: Mixture) -> list[tuple[int, int]]:
    return [mix[k] for k in range(len(mix))]


def test_the_order_is_a_pure_function():
    first, second = (mixture([7, None, 30], [1, 2, 0.5], 300, seed=3) for _ in range(2))
    forward = order(first)
    backward = [second[k] for k in reversed(range(300))][::-1]  # asked in another order, over several epochs
    assert forward == backward
    assert order(mixture([7, None, 30], [1, 2, 0.5], 300, seed=4)) != forward


def test_a_worker_gets_the_same_order():
    mix = mixture([7, 30], [1, 2], 200)
    half = [mix[k] for k in range(100)]
    copy = pickle.loads(pickle.dumps(mix))
    assert [copy[k] for k in range(200)] == order(mix)
    assert half == order(mix)[:100]


def test_a_longer_run_begins_like_a_shorter_one():
    """With constant weights; weights that move do so over the whole run."""
    assert order(mixture([9, None], [1, 3], 400))[:150] == order(mixture([9, None], [1, 3], 150))


@given(size=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_epoch_of_a_single_source_is_a_permutation(size, epochs, seed):
    rows = [row for _, row in order(mixture([size], [1], size * epochs, seed))]
    for epoch in range(epochs):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_of_a_mixed_source_are_permutations_and_differ():
    rows = [row for source, row in order(mixture([20, None], [1, 1], 500)) if source == 0]
    assert len(rows) > 200
    epochs = [tuple(rows[i : i + 20]) for i in range(0, len(rows) - 19, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(20)) not in epochs


def test_two_sources_of_one_size_are_shuffled_differently():
    rows = order(mixture([50, 50], [1, 1], 100))
    first, second = ([row for source, row in rows if source == s][:40] for s in (0, 1))
    assert first != second


def test_an_endless_source_is_walked_without_a_repeat():
    rows = [row for source, row in order(mixture([None, 3], [1, 1], 400)) if source == 0]
    assert rows == list(range(len(rows)))


def test_shares_are_the_weights():
    total, weights = 20_000, [3, 1, 0, 4]
    counts = np.array(mixture([None] * 4, weights, total).counts(total))
    shares = np.array(weights) / sum(weights)
    error = np.sqrt(shares * (1 - shares) / total)  # standard deviation of a binomial share
    assert (np.abs(counts / total - shares) <= 4 * error).all()
    assert counts[2] == 0


def test_weights_move_at_their_boundary_exactly():
    mix = mixture([None, None], [[[0, 1], [0.25, 0]], [[0, 0], [0.25, 1]]], 1000)
    assert [source for source, _ in order(mix)] == [0] * 250 + [1] * 750
    assert mix.counts(250) == [250, 0]
    assert mix.counts(1000) == [250, 750]


@given(
    points=st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=3),
    total=st.integers(1, 400),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_stretches_are_what_asking_every_sample_gives(points, total, seed):
    """Against the slow way: ask the weights at k / total for every k."""
    rng = np.random.default_rng(seed)
    weights = [piecewise([(s, rng.random() + 0.1) for s in sorted({0.0, *starts})]) for starts in points]
    shares, starts = _piecewise_shares(weights, total)
    assert starts[0] == 0
    for k in range(total):
        slow = np.array([weight(k / total) for weight in weights])
        stretch = np.searchsorted(starts, k, side="right") - 1
        assert np.array_equal(shares[stretch], slow / slow.sum())


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [[[0, 1], [0.5, 0]], 0]])
def test_weights_that_leave_nothing_to_draw_are_refused(weights):
    with pytest.raises(VlmtuneError, match=r"data.train: weights at (0|50)% of training are .* a positive sum"):
        mixture([5, 5], weights, 100)


def test_ten_million_samples_take_moments():
    """One Python call per sample would take half a minute."""
    weights = [piecewise([[0, 1], [0.3, 0.2]]), piecewise([[0, 0.1], [0.7, 1]])]
    started = time.perf_counter()
    _, starts = _piecewise_shares(weights, 10_000_000)
    assert time.perf_counter() - started < 0.5
    assert starts == [0, 3_000_000, 7_000_000]

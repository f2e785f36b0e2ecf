"""How the samples of a step are dealt to processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.share import Share, deal

COSTS = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 8))
def test_every_item_is_in_one_hand_and_no_hand_is_empty(costs, size):
    if len(costs) < size:
        with pytest.raises(ValueError, match="items for"):
            deal(costs, size)
        return
    hands = deal(costs, size)
    assert sorted(item for hand in hands for item in hand) == list(range(len(costs)))
    assert all(hand and hand == sorted(hand) for hand in hands)


@given(COSTS, st.integers(1, 8))
def test_no_hand_is_more_than_the_largest_item_above_the_mean(costs, size):
    """The last item of the fullest hand went to the hand with the least, which was at most the mean."""
    if len(costs) >= size:
        loads = [sum(costs[item] for item in hand) for hand in deal(costs, size)]
        assert max(loads) <= sum(costs) / size + max(costs)


def test_long_samples_are_spread():
    costs = [100, 1, 1, 100, 1, 1]
    assert [sum(costs[item] for item in hand) for hand in deal(costs, 2)] == [102, 102]


def test_shares_of_all_processes_are_the_step():
    """A source that was not counted counts as usual samples do."""
    samples = [(0, 3), (1, 0), (0, 1), (0, 2), (1, 5)]
    lengths = [[10, 500, 20, 30].__getitem__, None]
    shares = [[samples[n] for n in Share(rank, 2, lengths).of(samples)] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(samples)
    assert [(0, 1)] in shares, "500 tokens weigh as much as all others together"

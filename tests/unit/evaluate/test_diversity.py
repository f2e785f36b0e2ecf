"""distinct-n, repetition and the commonest reply, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.evaluate.diversity import distinct, diversity, repetition, units


def test_distinct_by_hand():
    """6 words, 4 different; 4 pairs (none over the border of two texts), 3 different."""
    texts = ["a red cat", "a red dog"]
    assert distinct(texts, 1) == pytest.approx(4 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)
    assert distinct(["one"], 2) == 0.0


def test_repetition_by_hand():
    """ "a b a b a b a b" has 5 4-grams: abab baba abab baba abab, 2 different."""
    assert repetition("a b a b a b a b") == pytest.approx(1 - 2 / 5)
    assert repetition("the quick brown fox jumps") == 0.0
    assert repetition("too short") == 0.0


def test_words_are_words_in_every_script():
    assert units("A cat, a CAT.") == ["a", "cat", ",", "a", "cat", "."]
    assert units("红色的猫") == ["红", "色", "的", "猫"]
    assert units("кот спит") == ["кот", "спит"]


def test_the_commonest_reply():
    found = diversity(["yes", "yes", "no", "yes"])
    assert (found.count, found.commonest, found.commonest_share) == (4, "yes", 0.75)
    with pytest.raises(ValueError, match="at least one"):
        diversity([])


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8))
def test_shares_are_shares_and_saying_it_twice_is_less_diverse(texts):
    one, two = diversity(texts), diversity(texts * 2)
    for value in (one.distinct_1, one.distinct_2, one.repetition, one.commonest_share):
        assert 0 <= value <= 1
    assert two.distinct_1 == pytest.approx(one.distinct_1 / 2) and two.repetition == pytest.approx(one.repetition)

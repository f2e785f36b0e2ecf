"""VQA accuracy: its closed form, every nine of ten annotators, and the official forms of answers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.evaluate.vqa import CONTRACTIONS, official_form, vqa_accuracy


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_the_number_of_people_who_agree(agreeing, expected):
    """With k of ten: (k · min(1, (k-1)/3) + (10-k) · min(1, k/3)) / 10."""
    answers = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["red", "blue", "dark red", "2"]), min_size=10, max_size=10), st.sampled_from("rb"))
def test_accuracy_is_the_mean_over_nine_of_ten(answers, letter):
    said = {"r": "red", "b": "blue"}[letter]
    nines = list(itertools.combinations(answers, 9))
    assert len(nines) == 10
    expected = sum(min(nine.count(said) / 3, 1) for nine in nines) / 10
    assert vqa_accuracy(said, answers) == pytest.approx(expected)


# Golden: what `processDigitArticle(processPunctuation(text))` of the official script (GT-Vision-Lab/VQA; the copy of
# MMF in lmms-eval 0.7.3) gives. 200,000 random strings of such pieces had no difference.
@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The red car", "red car"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("10.5", "10.5"),
        ("3.", "3"),
        ("U.S.", "us"),
        ("T-shirt", "t shirt"),
        ("left - right", "left right"),
        ("yes!", "yes"),
        ("(left)", "left"),
        ("a,b", "b"),
        ("red, blue", "red blue"),
        ("dont know", "don't know"),
        ("youre", "you're"),
        ("hadnt've", "hadn't've"),
        ("it's", "it's"),
        ("lets go", "lets go"),
        ("50%", "50%"),
        ("\tcat\n", "cat"),
        ("an", ""),
        ("", ""),
    ],
)
def test_official_forms(answer, form):
    assert official_form(answer) == form


def test_both_sides_are_put_into_the_form():
    assert vqa_accuracy("2 dogs", ["Two dogs."] * 10) == 1.0
    assert vqa_accuracy("", [""] * 10) == 1.0
    assert vqa_accuracy("", ["yes"] * 10) == vqa_accuracy("yes", [""] * 10) == 0.0


def test_contractions_are_the_official_ones():
    """Its 120 keys without four in capitals (it looks up lower case) and two that map to themselves."""
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["yall'd've"] == "y'all'd've" and CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert all(right.replace("'", "") == wrong.replace("'", "") for wrong, right in CONTRACTIONS.items())


@pytest.mark.parametrize("answers", [[], ["yes"], ["yes"] * 9, ["yes"] * 11])
def test_it_is_defined_on_ten_answers(answers):
    with pytest.raises(ValueError, match="defined on 10 answers"):
        vqa_accuracy("yes", answers)

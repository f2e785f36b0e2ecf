"""Scores of boxes against worked and published examples."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.evaluate.boxes import box_scores, iou, match_boxes


def test_iou_worked_examples():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 10, 10), (0, 0, 10, 5)) == pytest.approx(0.5)
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0  # touching
    assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0  # no area at all
    # Rosebrock, "Intersection over Union (IoU) for object detection": his published 0.7980 and 0.7899 count both end
    # pixels of a box, so its right and lower sides lie one further here.
    assert iou((39, 63, 204, 113), (54, 66, 199, 115)) == pytest.approx(0.7980, abs=5e-5)
    assert iou((49, 75, 204, 126), (42, 78, 187, 127)) == pytest.approx(0.7899, abs=5e-5)


boxes_strategy = st.lists(
    st.tuples(*[st.integers(0, 20)] * 4).map(
        lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
    ),
    max_size=4,
)


@settings(deadline=None)
@given(predicted=boxes_strategy, target=boxes_strategy)
def test_matching_beats_every_other_assignment(predicted, target):
    pairs = match_boxes(predicted, target)
    assert len(pairs) == min(len(predicted), len(target))
    short, long = sorted((predicted, target), key=len)
    best = max(sum(iou(a, b) for a, b in zip(short, order, strict=False)) for order in itertools.permutations(long))
    assert sum(overlap for _, _, overlap in pairs) == pytest.approx(best)


def test_matching_is_not_greedy():
    # Greedy would give the first prediction the first target (0.9 > 0.8) and leave the second with nothing.
    predicted = [(0, 0, 10, 9), (0, 0, 10, 4)]
    target = [(0, 0, 10, 10), (0, 0, 10, 8)]
    pairs = {(p, t) for p, t, _ in match_boxes(predicted, target)}
    assert pairs == {(0, 0), (1, 1)} or pairs == {(0, 1), (1, 0)}
    assert sum(o for *_, o in match_boxes(predicted, target)) == pytest.approx(max(0.9 + 0.5, 8 / 9 + 0.4))


def test_box_scores_count_missing_and_surplus_boxes():
    a, b = (0, 0, 10, 10), (20, 20, 30, 30)
    assert box_scores([[a]], [[a]]) == {"mean_iou": 1.0, "acc_50": 1.0}
    assert box_scores([[a, b]], [[b, a]]) == {"mean_iou": 1.0, "acc_50": 1.0}
    assert box_scores([[a]], [[a, b]]) == {"mean_iou": 0.5, "acc_50": 0.5}
    assert box_scores([[a, b]], [[a]]) == {"mean_iou": 0.5, "acc_50": 0.5}
    assert box_scores([[]], [[]]) == {"mean_iou": 1.0, "acc_50": 1.0}
    assert box_scores([[]], [[a]]) == box_scores([[a]], [[]]) == {"mean_iou": 0.0, "acc_50": 0.0}
    scores = box_scores([[a], [(0, 0, 10, 4)]], [[a], [a]])
    assert scores == {"mean_iou": pytest.approx(0.7), "acc_50": 0.5}


def test_box_scores_refuse_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="same number"):
        box_scores([[]], [])
    with pytest.raises(ValueError, match="at least one"):
        box_scores([], [])

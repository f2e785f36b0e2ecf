"""Metrics against worked and published examples."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.grounding import coordinates
from vlmtune.evaluate.metrics import (
    anls,
    box_scores,
    caption_f1,
    exact_match,
    iou,
    levenshtein,
    match_boxes,
    score_task,
    task_metrics,
)
from vlmtune.types import Boxes, ImageGeometry, Points, Sample, Text, Turn, VlmtuneError


def sample(*parts, task="default"):
    turns = (Turn("user", (Text("Question?"),)), Turn("assistant", tuple(parts)))
    return Sample(id="s", turns=turns, task=task, origin="val.jsonl:3")


# Levenshtein 1966 / Wagner-Fischer textbook pairs.
@pytest.mark.parametrize(
    "a, b, edits",
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "abc", 0)],
)
def test_levenshtein_of_published_pairs(a, b, edits):
    assert levenshtein(a, b) == levenshtein(b, a) == edits


def test_anls_follows_the_definition():
    assert anls("sitting", ["kitten"]) == pytest.approx(1 - 3 / 7)
    assert anls("Coca  Cola ", ["coca cola"]) == 1.0  # case and whitespace do not count
    assert anls("coca cola company", ["pepsi", "coca cola"]) == pytest.approx(1 - 8 / 17)  # best answer counts
    assert anls("ab", ["ac"]) == 0.0  # NL = 0.5 is not below the threshold
    assert anls("abc", ["abd"]) == pytest.approx(2 / 3)
    assert anls("", [""]) == 1.0
    assert anls("", ["x"]) == anls("x", [""]) == 0.0
    assert anls("x", []) == 0.0
    assert anls("word " * 5000, ["word"]) == 0.0  # a runaway reply is cheap


def test_anls_forgives_a_misread_letter_only():
    assert anls("restaurent", ["restaurant"]) == pytest.approx(0.9)
    assert anls("exit", ["entrance"]) == 0.0


def test_exact_match_forgives_whitespace_only():
    assert exact_match(" two  words\n", "two words") == 1.0
    assert exact_match("Two words", "two words") == 0.0


def test_caption_f1_of_sets():
    assert caption_f1("hospital top left; factory bottom left", "factory bottom left;hospital top left;") == 1.0
    assert caption_f1("hospital top left", "hospital top left; factory bottom left") == pytest.approx(2 / 3)
    assert caption_f1("a x; b x; c x", "a x; d x") == pytest.approx(2 / 5)
    assert caption_f1("", "a x") == 0.0
    assert caption_f1("", " ; ") == 1.0


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


BOX = (0.0, 0.0, 10.0, 10.0)


def score(task: str, predictions: list[str], samples: list[Sample], boxes: list) -> dict[str, float]:
    return score_task(task, predictions, samples, boxes, coordinates("norm1000").without_places)


@pytest.mark.parametrize(
    "task, reference, prediction, expected",
    [
        ("caption", "a left; b right", "a left; c right", {"f1": 0.5, "exact_match": 0.0}),
        ("vqa", "red", " red ", {"exact_match": 1.0}),
        ("ocr", "12:45", "12:46", {"anls": 0.8, "exact_match": 0.0}),
        ("referring", "violin", "violin", {"accuracy": 1.0}),
        ("my own task", "yes", "no", {"exact_match": 0.0}),
    ],
)
def test_score_task_of_text(task, reference, prediction, expected):
    scores = score(task, [prediction], [sample(Text(reference))], [[]])
    assert scores == pytest.approx(expected)
    assert tuple(scores) == task_metrics(task)


def test_score_task_of_grounding():
    samples = [sample(Boxes((BOX,))), sample(Text("none")), sample(Text("none"))]
    scores = score("grounding", ["<box>...</box>", "none", "<box>...</box>"], samples, [[BOX], [], [BOX]])
    assert scores == pytest.approx({"mean_iou": 2 / 3, "acc_50": 2 / 3})


def test_an_unknown_task_gets_box_metrics_where_the_reply_has_boxes():
    samples = [sample(Text("the cat "), Boxes((BOX,)), Text(" sleeps")), sample(Text("no idea"))]
    predictions = ["the cat <box>[[1,2,3,4]]</box> sleeps", "no idea"]
    scores = score("chat", predictions, samples, [[(0, 0, 10, 5)], []])
    assert scores == {"exact_match": 1.0, "mean_iou": 0.5, "acc_50": 1.0}


@pytest.mark.parametrize("name", ["norm1000", "markup", "paligemma", "kosmos2"])
def test_the_text_beside_places_is_compared_in_every_convention(name):
    convention, geometry = coordinates(name), ImageGeometry(20, 20, 40, 40)
    box, click = convention.render([BOX], geometry), convention.render_points([(1, 2)], geometry, click=True)
    samples = [sample(Text("the cat "), Boxes((BOX,))), sample(Text("press "), Points(((1, 2),), click=True))]
    for predictions, expected in (([f"the cat {box}", f"press {click}"], 1.0), ([f"a cat {box}", "pull"], 0.0)):
        scores = score_task("chat", predictions, samples, [[BOX], []], convention.without_places)
        assert scores["exact_match"] == expected
    plain = [sample(Text("the cat"))]  # a reply that points where it should not is not forgiven
    assert score_task("chat", [f"the cat {box}"], plain, [[BOX]], convention.without_places) == {"exact_match": 0.0}


def test_regions_are_not_targets():
    turn = sample(Boxes((BOX,), region=True), Text("violin"))
    assert score("chat", ["violin"], [turn], [[]]) == {"exact_match": 1.0}


def test_the_last_assistant_turn_is_the_reference():
    turns = (Turn("assistant", (Text("old"),)), Turn("user", (Text("?"),)), Turn("assistant", (Text("new"),)))
    assert score("vqa", ["new"], [Sample("s", turns)], [[]]) == {"exact_match": 1.0}


def test_a_sample_without_reply_is_named():
    lonely = Sample("s", (Turn("user", (Text("?"),)),), origin="val.jsonl:9")
    with pytest.raises(VlmtuneError, match="val.jsonl:9"):
        score("vqa", ["x"], [lonely], [[]])


def test_absence_has_to_be_said():
    samples = [sample(Text("none"))] * 2
    assert score("grounding", ["none", "hook hook hook"], samples, [[], []]) == {"mean_iou": 0.5, "acc_50": 0.5}
    assert score("grounding", ["hook", ""], samples, [[], []]) == {"mean_iou": 0.0, "acc_50": 0.0}

"""Questions at four levels: their answers against what was placed, their balance, what no training shows (A7)."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.data.atlas import PHOTOS, atlas, concept_names
from vlmtune.data.layout import RESERVED_STRIP, held_out, photo
from vlmtune.data.levels import KINDS_ASKED, LEVELS, NAMES_ASKED, LevelQuestion, LevelScenes
from vlmtune.data.questions import CLEAR_MARGIN, CLEARLY_LARGER
from vlmtune.data.scenes import SceneRecipe
from vlmtune.types import Boxes, Text

GROUPS = ("base", "new", "all")
SCENES = {(level, concepts): LevelScenes(level, concepts) for level in LEVELS for concepts in GROUPS}


def truth(question: LevelQuestion) -> str:
    """The answer to the question as it reads, from the objects that were placed: a second way to it."""
    things, words = question.sample.meta["objects"], question.question
    at = {thing["name"]: thing["box"] for thing in things}

    def centre(name: str, axis: int) -> float:
        return (at[name][axis] + at[name][axis + 2]) / 2

    def area(name: str) -> float:
        x1, y1, x2, y2 = at[name]
        return (x2 - x1) * (y2 - y1)

    if words == "What is in [region]?":
        (box,) = question.region.boxes
        return next(thing["name"] for thing in things if thing["box"] == list(box))
    if found := re.fullmatch(r"Any (.*)\?", words):
        return "yes" if found[1] in at else "no"
    if words == "What kind is top left?":
        return next(atlas()[thing["name"]].kind for thing in things if thing["where"] == "top left")
    if found := re.fullmatch(r"How many (.*)\?", words):
        return str(sum(thing["name"] == found[1] for thing in things))
    if found := re.fullmatch(r"Larger: (.*) or (.*)\?", words):
        small, large = sorted(found.groups(), key=area)
        assert area(large) >= CLEARLY_LARGER * area(small)
        return large
    if found := re.fullmatch(r"Is (.*) (left of|above) (.*)\?", words):
        axis = {"left of": 0, "above": 1}[found[2]]
        gap = centre(found[3], axis) - centre(found[1], axis)
        assert abs(gap) >= CLEAR_MARGIN
        return "yes" if gap > 0 else "no"
    assert words == "Which photo?"
    return question.sample.meta["background"].replace("_", " ")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SCENES)), st.integers(0, 5000))
def test_the_answer_is_what_was_placed(which, index):
    question = SCENES[which][index]
    assert question.answer in question.labels and len(set(question.labels)) == len(question.labels) > 1
    assert question.answer == truth(question) == question.sample.turns[-1].parts[0].text
    assert question.level == which[0] == question.sample.meta["level"]
    assert question.sample == SCENES[which][index].sample, "pure"
    assert len(question.sample.images) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SCENES)), st.integers(0, 5000))
def test_no_training_scene_shows_it(which, index):
    level, concepts = which
    sample = SCENES[which][index].sample
    names = {thing["name"] for thing in sample.meta["objects"]}
    assert names <= set(concept_names(concepts))
    pairs = [(a, b) for a in names for b in names if a < b]
    assert not pairs or any(held_out(*pair) for pair in pairs)
    assert sample.meta["background"] in PHOTOS["train" if level == "scene" else "val"]
    assert photo("grass").width > RESERVED_STRIP, "and a scene's photo is cut from the strip no training scene shows"


@pytest.mark.parametrize("concepts", GROUPS)
@pytest.mark.parametrize("level", LEVELS)
def test_few_questions_often_and_answers_balanced(level, concepts):
    asked = [SCENES[level, concepts][index] for index in range(240)]
    answers: dict[str, Counter] = {}
    labels: dict[str, set] = {}
    for question in asked:
        answers.setdefault(question.question, Counter())[question.answer] += 1
        labels.setdefault(question.question, set()).add(question.labels)
    assert len(answers) == {"object": 3, "attribute": 3, "relation": 4, "scene": 1}[level]
    for wording, counts in answers.items():
        (of_it,) = labels[wording]
        share = max(counts.values()) / counts.total()
        # five standard deviations of a share of 1/K in so many draws
        chance = 1 / len(of_it)
        assert share < chance + 5 * (chance * (1 - chance) / counts.total()) ** 0.5, (wording, counts)
    if level == "attribute":
        (kinds,) = labels["What kind is top left?"]
        assert len(kinds) == KINDS_ASKED
    if level == "object":
        (names,) = labels["What is in [region]?"]
        assert len(names) == NAMES_ASKED and set(names) <= set(concept_names(concepts))


def test_the_wording_is_that_of_the_training_data():
    """A model is asked as it was taught: every question is one the recipe can make, names and places apart."""
    forms = {
        SceneRecipe("new").sample(task, index, "val").meta["question"] for task in ("vqa", "referring")
        for index in range(80)
    }  # fmt: skip
    for level in LEVELS:
        for index in range(4):
            question = SCENES[level, "new"][index]
            assert question.sample.meta["question"] in forms
            texts = [p.text for p in question.sample.turns[0].parts if isinstance(p, Text)]
            assert question.question.replace("[region]", "") == "".join(texts)
            boxes = [p for p in question.sample.turns[0].parts if isinstance(p, Boxes)]
            assert question.region == (boxes[0] if boxes else None)

"""Which probe answers which question, what counts as right, and how questions are divided (SPEC A7)."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.levels import LevelQuestion
from vlmtune.evaluate.alignment import PER_QUESTION, Split, answer_in, answerable, prior_answers, probe_answers, right
from vlmtune.evaluate.choices import ChoiceRule
from vlmtune.evaluate.level_questions import FEWEST, LEARN_PER_TEST, row_questions, scene_questions, split_by_image
from vlmtune.types import Boxes, ImageRef, Sample, Text, Turn, VlmtuneError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(question: str, answer: str, labels=("yes", "no"), image: int = 0, level: str = "object", **fields):
    parts = (ImageRef(png(image)), *fields.pop("parts", ()), Text(question))
    turns = (Turn("user", parts), Turn("assistant", (Text(answer),)))
    sample = Sample(f"s{image}", turns, fields.pop("task", "vqa"), f"t.jsonl:{image}", fields.pop("meta", {}))
    return LevelQuestion(level, sample, question, answer, tuple(labels))


def wording(sample: Sample) -> str:
    return "".join(part.text for part in sample.turns[0].parts if isinstance(part, Text))


@pytest.mark.parametrize(
    "reply, label",
    [
        ("yes", "yes"), (" Yes.\n", "yes"), ("NO", "no"), ("yes, there is", None), ("", None), (".", None),
        ("a  b", "a b"), ("U.S.", "U.S."), ("us", "us"), ("US", "US"),
    ],
)  # fmt: skip
def test_what_a_reply_is(reply, label):
    assert answer_in(reply, ["yes", "no", "a b", "U.S.", "US", "us"]) == label


def test_right_is_the_questions_own_answer():
    test = [ask("Any owl?", "yes"), ask("Any owl?", "no"), ask("Any owl?", "no")]
    assert right(["Yes.", "yes", "nothing"], test) == [True, False, False]


def test_a_probe_for_each_question_that_is_asked_often():
    """The same feature answers one question, and the other the other way round: one probe could not do both."""
    draw = np.random.default_rng(0)
    signs = draw.choice([-1.0, 1.0], size=160)
    features = [torch.tensor([sign, 1.0]) for sign in signs]
    asked = [
        ask("Any owl?" if n % 2 else "Any ox?", "yes" if (sign > 0) == bool(n % 2) else "no", image=n)
        for n, sign in enumerate(signs)
    ]
    split = Split(asked[:120], asked[120:])
    answers = probe_answers(split, features[:120], features[120:])
    assert all(right(answers, split.test))


def test_rare_questions_share_a_probe_that_sees_their_words():
    """Every wording once; whether "big" is in it decides, the image adds nothing."""
    draw = np.random.default_rng(1)
    asked = [
        ask(f"Is thing {n} {'big' if big else 'small'}?", "yes" if big else "no", image=n)
        for n, big in enumerate(draw.integers(0, 2, 120))
    ]
    features = [torch.from_numpy(draw.normal(size=50)) for _ in asked]
    split = Split(asked[:90], asked[90:])
    assert answerable(split) == split
    assert np.mean(right(probe_answers(split, features[:90], features[90:]), split.test)) > 0.9


def test_questions_of_other_answers_have_other_probes_and_rare_ones_are_left_out():
    often = [ask("Any owl?", "yes" if n % 2 else "no", image=n) for n in range(PER_QUESTION)]
    few = [ask(f"Which of two {n}?", "left", ("left", "right"), image=n) for n in range(PER_QUESTION // 2 - 1)]
    split = Split([*often, *few], [often[0], few[0]])
    assert answerable(split).test == [often[0]]
    enough = [*few, ask("Which of two 99?", "right", ("right", "left"))]
    assert answerable(Split([*often, *enough], [often[0], few[0]])).test == [often[0], few[0]]


def test_regions_have_probes_of_their_own():
    """Features under a region and of the whole image differ in length: one wording, two probes."""
    at_place = [
        ask("What?", "yes" if n % 2 else "no", image=n, parts=[Boxes(((0, 0, 1, 1),), True)]) for n in range(40)
    ]
    whole = [ask("What?", "yes" if n % 2 else "no", image=n) for n in range(40)]
    vectors = [torch.tensor([float(n % 2)]) for n in range(40)], [torch.tensor([float(n % 2)] * 16) for n in range(40)]
    split = Split([*at_place[:30], *whole[:30]], [*at_place[30:], *whole[30:]])
    answers = probe_answers(split, [*vectors[0][:30], *vectors[1][:30]], [*vectors[0][30:], *vectors[1][30:]])
    assert all(right(answers, split.test))
    two = ask("What?", "yes", parts=[Boxes(((0, 0, 1, 1), (1, 1, 2, 2)), True)])
    assert two.region is None, "of several places none is the one"


def test_without_looking():
    learn = [ask(f"Any {name}?", "yes", image=n) for name in ("owl", "ox") for n in range(PER_QUESTION)]
    test = [ask("Any owl?", answer) for answer in ("no", "yes", "no")] + [ask("Any ox?", "yes")]
    assert prior_answers(Split(learn, test)) == ["no", "no", "no", "yes"]
    rare = [ask(f"Any {n}?", "no" if n else "yes") for n in range(3)]
    assert prior_answers(Split([], rare)) == ["no"] * 3, "questions that share a probe share the answer"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=300), st.integers(1, 80))
def test_no_image_is_on_both_sides(images, wanted):
    questions = [ask(f"Any {n}?", "yes", image=image) for n, image in enumerate(images)]
    split = split_by_image(questions, wanted)
    sides = [{question.sample.images[0].source for question in side} for side in (split.learn, split.test)]
    assert not sides[0] & sides[1]
    assert len(split.test) <= min(wanted, len(questions) // (1 + LEARN_PER_TEST))
    assert len(split.learn) <= LEARN_PER_TEST * max(1, len(split.test))
    assert split_by_image(list(reversed(questions)), wanted).test != [] or not split.test
    backwards = split_by_image(list(reversed(questions)), wanted)
    assert {q.sample.images[0].source for q in backwards.test} == sides[1], "the order of the rows does not matter"


def test_rows_of_ones_own_are_counted_in_or_out():
    def row(n: int, **fields):
        return ask("What colour?", ("red", "blue")[n % 2], (), n, meta={"level": "attribute"}, **fields).sample

    many = [row(n) for n in range(4 * FEWEST)]
    choices = [
        ask(f"Is {n} here?", "no", (), n, meta={"level": "object", "choices": ["yes", "no"]}).sample for n in range(40)
    ]
    by_task = [ask("Photo?", "day", (), n, task="when").sample for n in range(3)]
    others = [ask("Why?", f"because {n}", (), n, meta={"level": "scene"}).sample for n in range(7)]
    nobody = [ask("Who?", "me", (), n).sample for n in range(2)]
    place = Sample("p", (many[0].turns[0], Turn("assistant", (Boxes(((0, 0, 1, 1),)),))), meta={"level": "object"})
    rows = [*many, *choices, *by_task, *others, *nobody, place]
    found = row_questions(rows, {"when": "scene"}, ChoiceRule({"when": ["day", "night"]}), wording, 1000)
    assert list(found.splits) == ["attribute"]
    split = found.splits["attribute"]
    assert (len(split.test), len(split.learn)) == (FEWEST, 3 * FEWEST) and split.test[0].labels == ("blue", "red")
    assert found.left_out == {
        "without a level": 2, "without a reply of words alone": 1, "without a closed set of answers": 7,
    }  # fmt: skip
    assert found.too_few["object"].startswith("40 questions") and found.too_few["scene"].startswith("3 questions")
    assert found.too_few["relation"].startswith("0 questions")
    with pytest.raises(VlmtuneError, match=r"t.jsonl:5 \(sample s5\): meta.level is 'colour'; write one of object"):
        row_questions([ask("a?", "b", image=5, meta={"level": "colour"}).sample], {}, ChoiceRule({}), wording, 20)


def test_scenes_are_divided_and_carry_the_prompt_of_the_run():
    from vlmtune.data.prompts import SystemPrompt

    asked = scene_questions("new", 20, SystemPrompt("own", "Answer in one word."))
    assert not asked.too_few and not asked.left_out
    for level, split in asked.splits.items():
        assert (len(split.test), len(split.learn)) == (20, 20 * LEARN_PER_TEST), level
        ids = Counter(question.sample.id for question in [*split.test, *split.learn])
        assert max(ids.values()) == 1
        assert all(q.sample.turns[0].parts == (Text("Answer in one word."),) for q in split.test)

"""What the rows of a source share: each complaint for its reason, and none about sound sources (SPEC H1)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.habits import BOXES, CORNER_BOXES, ROWS, Habits, Traits, asked_digests, traits_of
from vlmtune.types import Boxes, ImageRef, Sample, Text, Turn

WIDE = (200, 80)


def of_boxes(boxes: list, size=WIDE, turned: bool = False) -> list[str]:
    """Codes of a source with one box per row."""
    habits = Habits()
    for row, box in enumerate(boxes):
        habits.add(row, Traits("vqa", ((*box, *map(float, size), float(turned)),), None, None, False, False, False))
    found = list(habits.findings())
    assert all(habit.says and 0 <= habit.row < len(boxes) for habit in found)
    return [habit.code for habit in found]


def drawn(count: int, size=WIDE, seed: int = 0) -> list[tuple[float, float, float, float]]:
    """Boxes anywhere in a picture."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        x, y = sorted(draw.uniform(0, size[0]) for _ in range(2)), sorted(draw.uniform(0, size[1]) for _ in range(2))
        found.append((x[0], y[0], x[1], y[1]))
    return found


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 120), st.tuples(st.integers(8, 3000), st.integers(8, 3000)))
def test_boxes_in_pixels(seed, count, size):
    assert of_boxes(drawn(count, size, seed), size) == []
    assert of_boxes(drawn(count, size, seed), size, turned=True) == []


@pytest.mark.parametrize("count", [BOXES, 60])
@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("boxes_swapped", lambda x1, y1, x2, y2: (y1, x1, y2, x2)),
        ("boxes_scaled", lambda *box: tuple(3 * v for v in box)),
        ("boxes_thousandths", lambda x1, y1, x2, y2: (5 * x1, 12.5 * y1, 5 * x2, 12.5 * y2)),
    ],
)
def test_boxes_in_another_system(code, make, count):
    boxes = [*drawn(count - 1), (10.0, 5.0, 199.0, 79.0)]
    assert of_boxes([make(*box) for box in boxes]) == [code]


def test_too_few_boxes_say_nothing():
    assert of_boxes([(0, 0, 70, 190)] * (BOXES - 1)) == []


def test_single_slips_are_no_habit():
    assert of_boxes([*drawn(60), (0, 0, 900, 70)]) == []


def test_boxes_before_exif():
    upright = [(y1, x1, y2, x2) for x1, y1, x2, y2 in drawn(40, WIDE)]  # of the sensor's 80 x 200
    assert of_boxes(upright, WIDE, turned=True) == ["boxes_turned"]
    assert of_boxes(upright, WIDE, turned=False) == ["boxes_swapped"], "EXIF is not to blame where it turned nothing"


def test_boxes_in_the_upper_left_corner():
    small = [tuple(0.4 * value for value in box) for box in drawn(CORNER_BOXES)]
    assert of_boxes(small) == ["boxes_corner"]
    assert of_boxes(small[:-1]) == [], "too few"
    assert of_boxes([*small, (0, 0, 199, 10)]) == [], "one that reaches the edge"


def test_the_picture_says_whether_it_was_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 200)).save(tmp_path / "a.jpg", exif=exif)
    sample = Sample("s", (Turn("user", (ImageRef(tmp_path / "a.jpg"),)), Turn("assistant", (Boxes(((1, 2, 3, 4),)),))))
    (box,) = traits_of(sample, [(200, 80)]).boxes
    assert box == (1, 2, 3, 4, 200, 80, 1)


# ---- texts ---------------------------------------------------------------------------------------------------------


def talk(question: str, reply: str) -> Sample:
    return Sample("s", (Turn("user", (Text(question),)), Turn("assistant", (Text(reply),))))


def of_talks(pairs: list[tuple[str, str]]) -> list[str]:
    habits = Habits()
    for row, pair in enumerate(pairs):
        habits.add(row, traits_of(talk(*pair), []))
    return [habit.code for habit in habits.findings()]


TALKS = [(f"What is in picture {n}?", f"There are {n} birds on it.") for n in range(40)]


def test_questions_and_answers():
    assert of_talks(TALKS) == []


def test_the_same_reply_again_and_again():
    same = [(question, "No.") for question, _ in TALKS]
    assert of_talks(same) == ["replies_alike"]
    assert of_talks(same[: ROWS - 1]) == [], "too few"
    assert of_talks([*same[:35], *TALKS[:5]]) == [], "most, but not nearly all"


def test_roles_that_are_exchanged():
    assert of_talks([(reply, question) for question, reply in TALKS]) == ["roles_swapped"]


def test_questions_may_be_asked_for():
    wanted = [("Ask something about the picture.", question) for question, _ in TALKS]
    assert of_talks(wanted) == []


def test_questions_that_hold_their_replies():
    assert of_talks([(f"Say this: well, {reply} {question}", reply) for question, reply in TALKS]) == []
    assert of_talks([(f"I see that {reply} {question}", reply) for question, reply in TALKS]) == ["reply_told"]


@pytest.mark.parametrize("form", ["Choose.\n{}\nNothing.", "A. {} B. Nothing at all.", "Choose: {}, or nothing."])
def test_options_to_choose_from_are_no_told_reply(form):
    assert of_talks([(form.format(reply), reply) for _, reply in TALKS]) == []


def test_a_limit_of_a_sorted_file():
    habits = Habits()
    for row, task in enumerate(["vqa", "caption", "vqa"]):
        habits.add(row, Traits(task, (), None, None, False, False, False))
    assert list(habits.findings(["vqa", "caption"])) == list(habits.findings()) == []
    (found,) = habits.findings(["vqa", "ocr", "grounding", "ocr"])
    assert found.code == "limit_of_sorted" and "every row of grounding, ocr, the task of 3 of 4 rows" in found.says


def test_what_is_compared_for_contradictions():
    picture, other = [b"a" * 16], [b"b" * 16]
    digest = asked_digests(talk("What colour?", "red"), picture)
    same = asked_digests(talk("What colour?", "Red."), picture)
    blue = asked_digests(talk("What colour?", "blue"), picture)
    assert digest == same and digest[:16] == blue[:16] and digest != blue
    assert asked_digests(talk("What colour?", "red"), other)[:16] != digest[:16]
    assert asked_digests(talk("", "red"), picture) is None, "captions may be worded in many ways"
    assert asked_digests(talk("What is it?", "a red circle on the left"), picture) is None

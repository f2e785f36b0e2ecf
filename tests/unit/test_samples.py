"""Which held-out samples are shown, and how they are put into words."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vlmtune.evaluate.evaluation import Scored
from vlmtune.samples import LOOKED_AT, Gallery
from vlmtune.types import Boxes, ImageRef, Points, Sample, Text, Turn


class Listed:
    """A source of samples that are there already."""

    name, format, identity = "listed", "a list", None

    def __init__(self, samples: list[Sample]):
        self.samples, self.size = samples, len(samples)
        self.read: list[int] = []

    def __getitem__(self, row: int) -> Sample:
        self.read.append(row)
        return self.samples[row]


BOX, POINT = (1.0, 2.0, 30.0, 40.0), (3.0, 4.0)


@pytest.mark.parametrize(
    ("asked", "answered", "question", "reference"),
    [
        (Boxes((BOX,), region=True), Text("a cat"), "What is at [region]?", "a cat"),
        (Points((POINT,)), Boxes((BOX, BOX)), "What is at [point]?", "2 boxes"),
        (Points((POINT,), click=True), Boxes((BOX,)), "What is at [click]?", "1 box"),
        (Text("it"), Points((POINT,), click=True), "What is at it?", "1 click"),
        (Text("it"), Points((POINT, POINT)), "What is at it?", "2 points"),
        (Text("it"), Boxes(()), "What is at it?", "0 boxes"),
    ],
)
def test_places_are_named_in_questions_and_counted_in_replies(asked, answered, question, reference, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (50, 50)).save(file, "PNG")
    prompt = (ImageRef(file.getvalue()), Text("What is at "), asked, Text("?"))
    sample = Sample("s", (Turn("user", prompt), Turn("assistant", (answered,))))
    (entry,) = Gallery({"val": [Listed([sample])]}, None, 1).describe(tmp_path)
    assert (entry["question"], entry["reference"]) == (question, reference)
    assert json.dumps(entry)


def asked(number: int, task: str, image: bool = True) -> Sample:
    prompt = (*((ImageRef(b"not looked at"),) if image else ()), Text("what?"))
    return Sample(f"{task} {number}", (Turn("user", prompt), Turn("assistant", (Text("it"),))), task=task)


def test_samples_are_spread_over_groups_and_tasks_and_have_a_picture():
    old = Listed([asked(0, "ocr", image=False), *(asked(n, task) for n in range(9) for task in ("ocr", "vqa"))])
    gallery = Gallery({"new": [Listed([asked(n, "vqa") for n in range(5)])], "old": [old]}, None, 6)
    assert [(group, sample.id) for group, sample in gallery.samples] == [
        ("new", "vqa 0"), ("new", "vqa 1"), ("old", "ocr 0"), ("old", "ocr 1"), ("old", "vqa 0"), ("old", "vqa 1"),
    ]  # fmt: skip
    assert Gallery({"old": [old]}, None, 0).samples == []


def test_only_samples_that_evaluations_see_are_shown():
    """With a limit the first rows; without one, rows of a long source from its beginning to its end."""
    first, whole = (Listed([asked(n, "vqa") for n in range(10 * LOOKED_AT)]) for _ in range(2))
    Gallery({"val": [first]}, 7, 24)
    assert first.read == list(range(7))
    Gallery({"val": [whole]}, None, 24)
    assert len(whole.read) == LOOKED_AT and whole.read[-1] >= 9.9 * LOOKED_AT


def test_answers_are_found_among_those_of_an_evaluation():
    gallery = Gallery({"val": [Listed([asked(n, "vqa") for n in range(3)])]}, None, 3)
    scored = [Scored("val", gallery.samples[2][1], "two", [BOX]), Scored("other", gallery.samples[0][1], "no", [])]
    assert gallery.answers(scored) == [None, None, ("two", [BOX])]
    before = {"metrics": {}, "replies": [["val", "vqa 1", "one", []], ["other", "vqa 0", "no", []]]}
    assert gallery.recorded(before) == [None, ("one", []), None]
    assert gallery.recorded(None) == [None] * 3

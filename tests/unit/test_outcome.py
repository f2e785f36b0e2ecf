"""How samples are put into words on the run page."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vlmtune.evaluate.evaluation import Evaluation, Scored
from vlmtune.outcome import gallery
from vlmtune.types import Boxes, ImageRef, Points, Sample, Text, Turn

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
    (entry,) = gallery(tmp_path, None, Evaluation({}, [Scored("val", sample, "reply", [])]), 1)
    assert (entry["question"], entry["reference"]) == (question, reference)
    assert json.dumps(entry)

"""What is odd in a single row: each complaint for its reason, none about honest text (SPEC H1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.suspicions import box_suspicions, image_suspicions, text_suspicions
from vlmtune.types import Boxes, ImageRef, Sample, Text, Turn

MARKERS = ["<image>", "<|vision_start|>"]


def asked(reply: str | Boxes, question: str = "What is it?", image: bool = True) -> Sample:
    picture = (ImageRef(b"x"),) if image else ()
    answer = Text(reply) if isinstance(reply, str) else reply
    return Sample("s", (Turn("user", (*picture, Text(question))), Turn("assistant", (answer,))))


def codes(sample: Sample) -> list[str]:
    found = list(text_suspicions(sample, MARKERS, "t.jsonl:1 (sample s)"))
    assert all(sentence.startswith("t.jsonl:1 (sample s): ") for _, sentence in found)
    return [code for code, _ in found]


@pytest.mark.parametrize("text", ["größer", "naïve café", "“quoted” – 5 €", "Привет", "图形", "ÂGE", "Ã", "SÃO PAULO"])
def test_text_in_its_own_encoding(text):
    assert codes(asked(text)) == []


@pytest.mark.parametrize("text", ["größer", "naïve café", "“quoted”", "it’s", "¿qué?", "😀"])
def test_text_read_in_another_encoding(text):
    broken = text.encode().decode("cp1252", errors="replace")
    assert codes(asked(f"It is {broken}.")) == ["text_broken"]


def test_bytes_that_no_decoder_could_read():
    assert codes(asked("gr\ufffd\ufffder")) == ["text_broken"]


@given(st.text(st.characters(codec="ascii")))
def test_plain_text_is_never_broken(text):
    assert "text_broken" not in codes(asked(text, image=False))


@pytest.mark.parametrize(
    ("sample", "marker"),
    [
        (asked("red<|im_end|>"), "<|im_end|>"), (asked("red", "<image>\nwhat"), "<image>"),
        (asked("[INST] red"), "[INST]"), (asked("<|vision_start|>"), "<|vision_start|>"),
    ],
)  # fmt: skip
def test_text_that_looks_like_a_marker(sample, marker):
    ((code, sentence),) = text_suspicions(sample, MARKERS, "here")
    assert code == "text_marker" and f"the marker {marker}, but stays text" in sentence


@pytest.mark.parametrize("text", ["assistant: 3 < 5", "a <b>bold</b> word", "image", "user", "[1] first"])
def test_text_that_looks_like_none(text):
    assert codes(asked(text)) == []


@pytest.mark.parametrize("text", ["at [12, 30, 200, 310]", "<box>(1,2),(30,40)</box>", "[0.1, 0.2, 0.5, 0.7]"])
def test_a_box_in_words(text):
    assert codes(asked(text)) == ["box_text"]
    assert codes(asked(text, image=False)) == [], "without a picture it is no place"
    assert codes(asked("red", text)) == [], "only a reply is learned"


@pytest.mark.parametrize("text", ["from 3 to 4, or 5", "[1, 2, 3]", "(1, 2)", "[[1, 2], [3, 4]]"])
def test_numbers_that_are_no_box(text):
    assert codes(asked(text)) == []


@pytest.mark.parametrize(
    ("boxes", "is_odd"),
    [
        ([(0.1, 0.2, 0.5, 0.9)], True), ([(0.0, 0.0, 1.0, 1.0)], True), ([(0.0, 0.0, 1.0, 8.0)], False),
        ([(0.1, 0.2, 0.5, 0.9), (3.0, 4.0, 9.0, 9.0)], False), ([(0.0, 0.0, 0.0, 0.0)], False),
    ],
)  # fmt: skip
def test_boxes_in_fractions(boxes, is_odd):
    found = [code for code, _ in box_suspicions(asked(Boxes(tuple(boxes))), "here")]
    assert found == ["box_fraction"] * is_odd


def test_a_picture_of_one_colour():
    image = Image.new("RGB", (20, 10), (7, 7, 7))
    ((code, sentence),) = image_suspicions(image, "here: image 1")
    assert code == "image_blank" and "(7, 7, 7)" in sentence
    image.putpixel((3, 3), (8, 7, 7))
    assert not list(image_suspicions(image, "here: image 1"))

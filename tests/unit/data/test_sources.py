"""Rows of every format become the same samples, and every complaint says which row, what, and what to do."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.data.images import load_image
from vlmtune.data.rows import resolve_image
from vlmtune.data.sources import LOOKED_AT, FileSource, SceneSource
from vlmtune.errors import VlmtuneError
from vlmtune.types import Boxes, ImageName, ImageRef, Points, Sample, Text, Turn


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "mit leer.png"):
        (tmp_path / "images" / name).write_bytes(png())
    return tmp_path


def source(folder: Path, rows: list[Any] | str, name: str = "train.jsonl", **options) -> FileSource:
    path = folder / name
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FileSource(path, **options)


def one(folder: Path, row: Any, **options) -> Sample:
    return source(folder, [row], **options)[0]


def user(*content: Any) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


REPLY = {"role": "assistant", "content": "A red square."}


# ---- formats ----------------------------------------------------------------------------------------------------


def test_openai_messages_with_text(folder):
    row = {
        "id": "s1",
        "task": "vqa",
        "meta": {"level": "object"},
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("What is <image>?"),
            REPLY,
            user("And now?"),
            {"role": "assistant", "content": "Blue.", "train": False},
        ],
    }
    sample = one(folder, row)
    assert sample == Sample(
        "s1",
        (
            Turn("system", (Text("Be brief."),)),
            Turn("user", (Text("What is <image>?"),)),
            Turn("assistant", (Text("A red square."),)),
            Turn("user", (Text("And now?"),)),
            Turn("assistant", (Text("Blue."),), train=False),
        ),
        "vqa",
        f"{folder}/train.jsonl:1",
        {"level": "object"},
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "images/a.png"},
        {"type": "image", "path": "images/a.png"},
        {"type": "image", "url": "images/a.png"},
        {"type": "image_url", "image_url": {"url": "images/a.png"}},
        {"type": "image_url", "image_url": "images/a.png"},
        {"type": "image_url", "image_url": {"url": "file://{folder}/images/a.png"}},
        {"type": "image", "image": "{folder}/images/a.png"},
        {"type": "image", "image": "images/../images/a.png"},
    ],
)
def test_typed_content_names_an_image_file(folder, part):
    part = json.loads(json.dumps(part).replace("{folder}", str(folder)))
    sample = one(folder, {"messages": [user({"type": "text", "text": "What?"}, part), REPLY]})
    text, image = sample.turns[0].parts
    assert text == Text("What?")
    assert image.source.samefile(folder / "images" / "a.png")
    assert load_image(image.source, "test").size == (8, 4)


def test_a_file_url_is_unquoted(folder):
    url = f"file://{folder}/images/mit%20leer.png"
    sample = one(folder, {"messages": [user({"type": "image_url", "image_url": url}), REPLY]})
    assert sample.images[0].source == folder / "images" / "mit leer.png"


def test_a_data_url_holds_the_bytes(folder):
    url = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    sample = one(folder, {"messages": [user({"type": "image_url", "image_url": {"url": url}}), REPLY]})
    assert sample.images == [ImageRef(png("blue"))]
    assert load_image(sample.images[0].source, "test").getpixel((0, 0)) == (0, 0, 255)


def test_image_ids_and_boxes_are_typed_fields(folder):
    row = {
        "messages": [
            user(
                {"type": "image", "image": "images/a.png", "id": "img1"},
                {"type": "image", "image": "images/b.png"},
                {"type": "text", "text": "What is at "},
                {"type": "box", "boxes": [[0, 1, 2.5, 3]], "region": True, "image": 1},
            ),
            {"role": "assistant", "content": [{"type": "box", "boxes": [[1, 1, 2, 2], [3, 0, 8, 4]]}]},
        ]
    }
    sample = one(folder, row)
    assert [image.id for image in sample.images] == ["img1", None]
    assert sample.turns[0].parts[3] == Boxes(((0, 1, 2.5, 3),), region=True, image=1)
    assert sample.turns[1].parts == (Boxes(((1, 1, 2, 2), (3, 0, 8, 4))),)


def reference(id: Any) -> dict:
    return {"type": "image_ref", "id": id}


def test_parts_refer_to_images_by_id(folder):
    image = {"type": "image", "image": "images/a.png"}
    row = {
        "messages": [
            user(image, image | {"id": "img1"}, {"type": "text", "text": "what"}),
            {"role": "assistant", "content": [{"type": "box", "boxes": [[0, 1, 2, 3]], "image": "img1"}]},
            user(
                {"type": "text", "text": "and in "}, {"type": "image_ref", "id": "img1"}, {"type": "text", "text": "?"}
            ),
            REPLY,
        ]
    }
    sample = one(folder, row)
    assert [image.id for image in sample.images] == [None, "img1"]
    assert sample.turns[1].parts == (Boxes(((0, 1, 2, 3),), image=1),)
    assert sample.turns[2].parts == (Text("and in "), ImageName("img1"), Text("?"))


def test_points_and_clicks_are_typed_fields(folder):
    row = {
        "messages": [
            user(
                {"type": "image", "image": "images/a.png"},
                {"type": "text", "text": "Press what is at "},
                {"type": "point", "points": [[1, 2.5], [3, 4]]},
            ),
            {"role": "assistant", "content": [{"type": "point", "points": [[2, 3]], "click": True, "image": 0}]},
        ]
    }
    sample = one(folder, row)
    assert sample.turns[0].parts[2] == Points(((1.0, 2.5), (3.0, 4.0)))
    assert sample.turns[1].parts == (Points(((2.0, 3.0),), click=True),)


def test_llava(folder):
    row = {
        "id": "000033471",
        "image": "images/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A <image> square."},  # in a reply it is text
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    sample = source(folder, [row], "llava.json")[0]
    picture = ImageRef(folder / "images" / "a.png")
    assert sample.id == "000033471"
    assert sample.origin == f"{folder}/llava.json:1"
    assert [turn.parts for turn in sample.turns] == [
        (picture, Text("What is this?")),
        (Text("A <image> square."),),
        (Text("Sure?"),),
        (Text("Yes."),),
    ]
    assert [turn.role for turn in sample.turns] == ["user", "assistant", "user", "assistant"]


def test_sharegpt_interleaves_its_images_in_order(folder):
    row = {
        "images": ["images/a.png", "images/b.png"],
        "conversations": [
            {"from": "system", "value": "Look."},
            {"from": "human", "value": "Compare <image> with <image>."},
            {"from": "gpt", "value": "Same."},
        ],
    }
    parts = one(folder, row).turns[1].parts
    assert parts == (
        Text("Compare "),
        ImageRef(folder / "images" / "a.png"),
        Text(" with "),
        ImageRef(folder / "images" / "b.png"),
        Text("."),
    )


def test_qwen_vl_reads_img_and_keeps_every_other_character(folder):
    """The form of Qwen-VL's own fine-tuning data; <ref> and <box> are text there, in the coordinates they are in."""
    row = {
        "id": "identity_2",
        "conversations": [
            {
                "from": "user",
                "value": "Picture 1: <img>images/a.png</img>\nPicture 2: <img>images/b.png</img>\nBoth of what?",
            },
            {"from": "assistant", "value": "<ref>Squares</ref><box>(588,499),(725,789)</box>"},
            {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": "I wrote <img>no.png</img>"},  # in a reply it is text
        ],
    }
    assert [turn.parts for turn in one(folder, row).turns] == [
        (
            Text("Picture 1: "),
            ImageRef(folder / "images" / "a.png"),
            Text("\nPicture 2: "),
            ImageRef(folder / "images" / "b.png"),
            Text("\nBoth of what?"),
        ),
        (Text("<ref>Squares</ref><box>(588,499),(725,789)</box>"),),
        (Text("Sure?"),),
        (Text("I wrote <img>no.png</img>"),),
    ]


def test_img_is_text_in_a_row_with_an_image_field(folder):
    row = {"image": "images/a.png", "conversations": SHAREGPT}
    row["conversations"] = [{"from": "human", "value": "<image>What does <img>x</img> mean?"}, SHAREGPT[1]]
    assert one(folder, row).turns[0].parts[1] == Text("What does <img>x</img> mean?")


A, B = ("images/a.png", "images/b.png")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Compare <image>\nand <image>.", ["Compare ", "a", "and ", "b", "."]),
        ("Compare them.", ["a", "b", "Compare them."]),  # without a mark they stand first
        ([{"type": "text", "text": "Compare them."}], ["a", "b", "Compare them."]),
        ([{"type": "image"}, {"type": "text", "text": "<image>?"}, {"type": "image"}], ["a", "<image>?", "b"]),
        ([{"type": "image", "index": 1}, {"type": "image", "index": 0}], ["b", "a"]),
        ([{"type": "image", "image": B}, {"type": "image"}, {"type": "text", "text": "?"}], ["b", "a", "?"]),
        (
            [{"type": "image", "image": A}, {"type": "image", "image": B}, {"type": "image", "image": A}],
            ["a", "b", "a"],
        ),
    ],
)
def test_messages_with_an_image_field(folder, content, expected):
    """As tables and trl have it: the images in a field, and messages with marks, with bare parts, or with neither."""
    row = {
        "images": [A, B],
        "messages": [{"role": "system", "content": "Look."}, {"role": "user", "content": content}, REPLY],
    }
    sample = one(folder, row)
    said = [p.text if isinstance(p, Text) else p.source.stem for p in sample.turns[1].parts]
    assert said == expected
    assert sample.turns[0].parts == (Text("Look."),)


def test_without_images_a_mark_in_messages_is_text(folder):
    for images in ({}, {"images": []}, {"images": None}, {"image": ""}):
        sample = one(folder, {"messages": [user("What is <image>?"), REPLY], **images})
        assert sample.turns[0].parts == (Text("What is <image>?"),)


def test_questions_with_answers_boxes_and_no_images(folder):
    rows = [
        {"question": "What?", "answer": "That.", "images": [A, B], "system": "Be brief."},
        {"question": "Where is it in <image>?", "answer": "Here:", "boxes": [[0, 1, 2, 3]], "image": A},
        {"question": "What is <image>?", "answer": "A mark."},
    ]
    assert [sample.turns for sample in (source(folder, rows)[i] for i in range(3))] == [
        (
            Turn("system", (Text("Be brief."),)),
            Turn("user", (ImageRef(folder / A), ImageRef(folder / B), Text("What?"))),
            Turn("assistant", (Text("That."),)),
        ),
        (
            Turn("user", (Text("Where is it in "), ImageRef(folder / A), Text("?"))),
            Turn("assistant", (Text("Here:"), Boxes(((0, 1, 2, 3),)))),
        ),
        (Turn("user", (Text("What is <image>?"),)), Turn("assistant", (Text("A mark."),))),
    ]


def test_captions(folder):
    sample = one(folder, {"image": A, "caption": "A red square.", "task": "caption"})
    assert sample.turns == (Turn("user", (ImageRef(folder / A),)), Turn("assistant", (Text("A red square."),)))


def test_system_of_sharegpt_comes_first(folder):
    row = {"system": "Be brief.", "conversations": SHAREGPT, "image": A}
    assert one(folder, row).turns[0] == Turn("system", (Text("Be brief."),))


def test_entities_are_parts_of_the_reply(folder):
    row = {"messages": [user("A red square?"), REPLY], "entities": ["red square", "A", "red"], "meta": {"level": 1}}
    sample = one(folder, row)
    expected = (Text("A", entity=True), Text(" "), Text("red square", entity=True), Text("."))
    assert [turn.parts for turn in sample.turns] == [(Text("A red square?"),), expected]
    assert sample.meta == row["meta"] == {"level": 1}
    content = [{"type": "text", "text": "A "}, {"type": "text", "text": "red", "entity": True}]
    marked = one(folder, {"messages": [user("?"), {"role": "assistant", "content": content}]})
    assert marked.turns[1].parts == (Text("A "), Text("red", entity=True))


def test_an_entity_is_a_whole_word(folder):
    reply = {"role": "assistant", "content": "A cart, a car; carcar car."}
    sample = one(folder, {"messages": [user("?"), reply], "entities": ["car"]})
    assert [part.text for part in sample.turns[1].parts] == ["A cart, a ", "car", "; carcar ", "car", "."]
    with pytest.raises(VlmtuneError, match="entity 'arc' occurs in no reply as a whole word"):
        one(folder, {"messages": [user("?"), reply], "entities": ["arc"]})


def test_an_entity_of_a_reply_that_does_not_train_is_refused(folder):
    row = {
        "messages": [user("What?"), REPLY | {"train": False}, user("?"), REPLY | {"content": "No."}],
        "entities": ["red"],
    }
    with pytest.raises(VlmtuneError, match="entity 'red' occurs in no reply"):
        one(folder, row)


def test_null_stands_for_an_absent_part_of_a_message(folder):
    """Arrow gives every part of a column the same fields."""
    empty = {"text": None, "image": None, "boxes": None, "region": None, "id": None, "index": None}
    content = [
        empty | {"type": "image", "image": A},
        empty | {"type": "text", "text": "Where?"},
        {"type": "box", "boxes": [[0, 0, 1, 1]], "region": None, "image": None},
    ]
    sample = one(folder, {"messages": [{"role": "user", "content": content, "train": None}, REPLY | {"train": None}]})
    assert sample.turns[0].parts == (ImageRef(folder / A), Text("Where?"), Boxes(((0, 0, 1, 1),)))
    assert sample.turns[1].train


def test_text_only_rows_need_no_image(folder):
    rows = [
        {"messages": [user("Hi"), REPLY]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ]
    assert [sample.images for sample in source(folder, rows)] == [[], []]


def test_blank_lines_are_skipped_and_lines_counted_from_one(folder):
    row = json.dumps({"messages": [user("Hi"), REPLY]})
    lines = source(folder, f"\n{row}\r\n  \n\n{row}\n{row}")  # no line break at the end
    assert lines.size == 3
    assert [lines[i].origin.rsplit(":", 1)[1] for i in range(3)] == ["2", "5", "6"]
    assert [lines[i].id for i in range(3)] == ["train/0", "train/1", "train/2"]


def test_options(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "c.png").write_bytes(png())
    rows = [
        {"messages": [user({"type": "image", "image": "c.png"}), REPLY]},
        {"messages": [user("Hi"), REPLY], "task": "ocr"},
        {"messages": [user("Hi"), REPLY]},
    ]
    three = source(folder, rows, image_root=folder / "elsewhere", task="caption", limit=2)
    assert three.size == 2
    assert [three[0].task, three[1].task] == ["caption", "ocr"]
    assert three[0].images[0].source == folder / "elsewhere" / "c.png"
    assert source(folder, rows, limit=99).size == 3
    assert source(folder, rows).name == "train.jsonl"


def test_tasks_behind_the_limit(folder):
    rows = [{"messages": [user("Hi"), REPLY], "task": "vqa" if n < 100 else "ocr"} for n in range(1000)]
    rows[500] = {"messages": []}
    assert source(folder, rows).tasks_left_out() == []
    assert source(folder, rows, limit=998).tasks_left_out() == ["ocr", "ocr"]
    found = source(folder, rows, limit=40).tasks_left_out()
    assert found == ["vqa"] * 4 + ["ocr"] * 60 and len(found) == LOOKED_AT, "every 15th; one of them is row 40"
    assert source(folder, rows, limit=499).tasks_left_out().count("ocr") == LOOKED_AT
    assert source(folder, rows, limit=500).tasks_left_out().count("ocr") == LOOKED_AT - 1, "nobody reads row 500"


def test_a_source_is_pure(folder):
    rows = [{"messages": [user(f"Question {n} ü"), REPLY]} for n in range(20)]
    first = source(folder, rows)
    second = FileSource(folder / "train.jsonl")
    assert [first[i] for i in (13, 2, 19, 2)] == [second[i] for i in (13, 2, 19, 2)]
    assert first[13].turns[0].parts == (Text("Question 13 ü"),)


def test_null_stands_for_an_absent_field(folder):
    row = {"id": None, "task": None, "meta": None, "messages": [user("Hi"), REPLY]}
    sample = one(folder, row, task="vqa")
    assert (sample.id, sample.task, sample.meta) == ("train/0", "vqa", {})


def test_a_symbolic_link_below_the_root_is_followed(folder, tmp_path_factory):
    big = tmp_path_factory.mktemp("big-disk")
    (big / "x.png").write_bytes(png())
    (folder / "linked").symlink_to(big)
    sample = one(folder, {"messages": [user({"type": "image", "image": "linked/x.png"}), REPLY]})
    assert load_image(sample.images[0].source, "test").size == (8, 4)


def test_scenes_are_endless_or_limited_and_pure():
    endless, limited = SceneSource("base", "vqa", "train"), SceneSource("base", "vqa", "train", limit=5)
    assert (endless.size, limited.size) == (None, 5)
    assert endless[3] == limited[3] == SceneSource("base", "vqa", "train", start=2)[1]
    assert endless[10**6].turns != endless[3].turns
    assert endless.name == "scenes/base/vqa/train"


# ---- complaints -------------------------------------------------------------------------------------------------


def picture(name: str) -> dict:
    return {"messages": [user({"type": "image", "image": name}), REPLY]}


def named(*ids: Any) -> dict:
    parts = [{"type": "image", "image": "images/a.png", "id": id} for id in ids]
    return {"messages": [user(*parts), REPLY]}


def box(boxes: list, **more: Any) -> dict:
    return {"messages": [user({"type": "box", "boxes": boxes, **more}), REPLY]}


def point(points: list, **more: Any) -> dict:
    return {"messages": [user({"type": "point", "points": points, **more}), REPLY]}


SHAREGPT = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "That."}]


@pytest.mark.parametrize(
    ("row", "complaint", "remedy"),
    [
        ({}, "a row needs 'messages' (OpenAI) or 'conversations'", ""),
        ({"messages": []}, "'messages' must be a list with at least one message", ""),
        ({"messages": {"role": "user"}}, "'messages' must be a list", ""),
        ({"messages": ["hi"]}, "message 1 needs 'role' and 'content'", ""),
        ({"messages": [{"role": "user"}]}, "message 1 needs 'role' and 'content'", ""),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": None}]},
            "message 2: 'content' is text or a list",
            "",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1: unknown role 'tool'", "known: human, gpt, user"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']", "known: "),
        ({"messages": [user("Hi")]}, "no assistant text to learn from", "add a reply or remove the row"),
        ({"messages": [user("Hi"), REPLY | {"content": " \n"}]}, "no assistant text", "add a reply or remove the row"),
        (
            {"messages": [user("Hi"), REPLY, user("?"), REPLY | {"content": ""}]},
            "the assistant reply in message 4 is empty",
            "fill it or set train: false",
        ),
        ({"messages": [user("Hi"), REPLY | {"train": "no"}]}, "message 2: 'train' is true or false, not 'no'", ""),
        (
            {
                "messages": [
                    REPLY | {"content": [{"type": "text", "text": "x"}, {"type": "image", "image": "images/a.png"}]}
                ]
            },
            "message 1 puts an image into an assistant reply",
            "move it to the user",
        ),
        (
            {"messages": [user({"type": "video", "video": "x.mp4"}), REPLY]},
            'part {"type": "video"',
            "is not text, image",
        ),
        ({"messages": [user({"type": "text", "text": 3}), REPLY]}, "message 1: part", "is not text, image"),
        ({"messages": [user({"type": "image"}), REPLY]}, "message 1: part", "is not text, image"),
        ({"messages": [user({"type": "text", "text": "x"}, "y"), REPLY]}, 'part "y"', "is not text, image"),
        (picture("no/x.png"), "image no/x.png not found; tried {folder}/no/x.png", "correct the path or image_root"),
        (picture("/no/x.png"), "image /no/x.png not found; tried /no/x.png", "correct the path"),
        (picture("images"), "image images not found", "correct the path"),
        (picture("../x.png"), "leaves its folder {folder}", "name the right image_root"),
        (picture("images/../../x.png"), "leaves its folder", "image_root"),
        (picture(".."), "leaves its folder", "image_root"),
        (picture("https://x.org/a.png"), "is on the network", "download it and name the file"),
        (picture("data:image/png;base64,%%%"), "not valid base64", "base64"),
        (picture("data:image/png;base64,ü"), "not valid base64", "base64"),
        (picture("A" * 5000), "is not a path", "data:image/png;base64"),
        (picture("A" * 500), "not found", "correct the path"),
        (picture("a\0.png"), "is not a path", "data:image/png;base64"),
        (box([[1, 2, 3]]), "box [1, 2, 3] is not [x1, y1, x2, y2]", "x1 <= x2"),
        (box([[5, 2, 3, 4]]), "box [5, 2, 3, 4] is not", "x1 <= x2"),
        (box([[0, 0, 1e999, 4]]), "box [0, 0, inf, 4] is not", "x1 <= x2"),
        (box([["0", 0, 1, 4]]), "box ['0', 0, 1, 4] is not", "x1 <= x2"),
        (box([[0, 0, 1, 1]]), "a box refers to image 0 (from 0) of 0", "correct its 'image'"),
        (box([[0, 0, 1, 1]], region=1), "a box's 'region' is true or false", "not 1"),
        (box([[0, 0, 1, 1]], image=-1), "the 'image' of a box is an image number from 0 or an id", "not -1"),
        (box([[0, 0, 1, 1]], image="x"), 'no image before it has the id "x"', "none has an id"),
        (box([[0, 0, 1, 10**400]]), "is not [x1, y1, x2, y2]", "x1 <= x2"),
        (point([[1, 2, 3]]), "point [1, 2, 3] is not [x, y] in pixels", ""),
        (point([[1, True]]), "point [1, True] is not [x, y] in pixels", ""),
        (point([[1, 1e999]]), "point [1, inf] is not [x, y] in pixels", ""),
        (point([1, 2]), "point 1 is not [x, y] in pixels", ""),
        (point([[1, 2]]), "a point refers to image 0 (from 0) of 0", "correct its 'image'"),
        (point([[1, 2]], click="yes"), "a point's 'click' is true or false", "not"),
        (point([[1, 2]], image=-1), "the 'image' of a point is an image number", "not -1"),
        (
            {"messages": [user({"type": "image_ref", "id": "a"}), REPLY]},
            'no image before it has the id "a"',
            "correct it",
        ),
        (
            {"messages": [user({"type": "image_ref", "id": None}), REPLY]},
            "no image before it has the id null",
            "correct",
        ),
        (named("a b"), 'the image id "a b" is not a word', "letters, digits"),
        (named(7), "the image id 7 is not a word", "letters, digits"),
        (named("a", "a"), "a second image has the id 'a'", "give each its own"),
        ({"messages": [user({"type": "point", "x": 1}), REPLY]}, "message 1: part", "box or point"),
        ({"conversations": []}, "'conversations' must be a list with at least one", ""),
        ({"conversations": [{"from": "human"}]}, "message 1 needs 'from' and a text 'value'", ""),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'", "known: human"),
        ({"conversations": SHAREGPT}, "1 <image> marks in user text, but 0 images", "make them equal"),
        (
            {"conversations": SHAREGPT, "images": ["images/a.png", "images/b.png"]},
            "1 <image> marks in user text, but 2 images",
            "make them equal",
        ),
        (
            {"conversations": SHAREGPT, "images": [{"bytes": "x"}]},
            "'image' is one path and 'images' a list of paths",
            "",
        ),
        ({"conversations": SHAREGPT, "image": 3}, "'image' is one path and 'images' a list of paths", ""),
        (
            {"conversations": SHAREGPT, "image": "images/z.png"},
            "message 1: image images/z.png not found",
            "correct the path",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_id(folder, row, complaint, remedy):
    good = json.dumps({"messages": [user("Hi"), REPLY]})
    rows = source(folder, f"{good}\n\n{json.dumps({'id': 'bad-7'} | row)}\n")
    with pytest.raises(VlmtuneError) as caught:
        rows[1]
    message = str(caught.value)
    assert message.startswith(f"{folder}/train.jsonl:3 (sample bad-7)")
    assert complaint.replace("{folder}", str(folder)) in message
    assert remedy in message
    assert "\n" not in message
    assert message.endswith(".")
    assert rows[0].id == "train/0"  # the other rows are still there


def test_a_broken_line_is_named(folder):
    rows = source(folder, '{"messages": []}\n{"messages": [}\n[1]\n')
    with pytest.raises(VlmtuneError, match=r"train.jsonl:2: not valid JSON .*; mend or remove the line"):
        rows[1]
    with pytest.raises(VlmtuneError, match=r"train.jsonl:3: a row is a JSON object, this is list"):
        rows[2]


def test_a_line_that_is_not_utf8_is_named(folder):
    path = folder / "latin.jsonl"
    path.write_bytes('{"messages": "ü"}\n'.encode("latin-1"))
    with pytest.raises(VlmtuneError, match=r"latin.jsonl:1: not valid JSON"):
        FileSource(path)[0]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", "", "holds no rows"),
        ("x.jsonl", "\n \n", "holds no rows"),
        ("x.json", "[]", "holds no rows"),
        ("x.json", "{}", "a .json data file is a list of conversations, this is a dict"),
        ("x.json", "[", "not valid JSON"),
        ("x.xml", "x", "unknown ending '.xml'; use .jsonl or .json"),
    ],
)
def test_a_bad_file_is_named(folder, name, content, complaint):
    with pytest.raises(VlmtuneError) as caught:
        source(folder, content, name)
    assert str(folder / name) in str(caught.value)
    assert complaint in str(caught.value)


def test_a_missing_file_is_named(folder):
    with pytest.raises(VlmtuneError, match=f"data file {folder}/none.jsonl does not exist"):
        FileSource(folder / "none.jsonl")


def test_every_place_tried_is_shown(folder):
    roots = [folder, folder / "images", Path("/nowhere")]
    with pytest.raises(VlmtuneError) as caught:
        resolve_image("z.png", "here", roots)
    assert all(str(root / "z.png") in str(caught.value) for root in roots)
    assert resolve_image("a.png", "here", roots) == folder / "images" / "a.png"


def test_a_root_may_be_the_root_of_the_file_system(folder):
    inside = str(folder / "images" / "a.png")
    assert resolve_image(inside.lstrip("/"), "here", [Path("/")]) == Path(inside)

"""Every finding of `check-data` on a small file that has it, and nothing on files that have not."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from files_on_disk import write_jsonl, write_parquet
from PIL import Image

from vlmtune.data.check import CODES, CheckedRow, RowCheck, check_rows
from vlmtune.data.duplicates import Duplicates, SplitSource, first_equal
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.sources import FileSource
from vlmtune.models.load import load_processor


@pytest.fixture
def encoder(tiny_folder) -> Encoder:
    return Encoder(load_processor(str(tiny_folder("qwen2_5_vl"))), coordinates("norm1000"))


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    """Noise: other pixels for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header speaks of side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def question(number: int, image: str | None = None, **fields) -> dict:
    picture_of = {} if image is None else {"image": image}
    return {"id": f"s{number}", **picture_of, "question": f"What is {number}?", "answer": "A cat.", **fields}


def answered_by_box(box: list[float]) -> dict:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Find the cat."}]
    reply = [{"type": "box", "boxes": [box]}]
    return {"id": "s0", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}


def checked(path: Path, encoder: Encoder, workers: int = 0, **wish) -> list[CheckedRow]:
    return list(check_rows(RowCheck(FileSource(path), path.name, encoder, **wish), workers))


def findings_of(folder: Path, row: dict, encoder: Encoder, **wish):
    (only,) = checked(write_jsonl(folder / "t.jsonl", [row]), encoder, **wish)
    return only.findings


def test_a_good_row_has_its_true_length_and_no_findings(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    path = write_jsonl(tmp_path / "t.jsonl", [question(0, "a.png"), question(1)])
    one, other = checked(path, encoder, max_length=500)
    assert not one.findings and not other.findings
    source = FileSource(path)
    assert [one.tokens, other.tokens] == [len(encoder.encode(source[0])), len(encoder.encode(source[1]))]
    assert [image.size for image in one.images] == [(40, 30)] and not other.images


IMAGES = {
    "image_corrupt": picture(0, (200, 200), "JPEG")[:4000],
    "image_empty": b"",
    "image_bomb": bomb(60_000),
    "image_aspect": picture(0, (20, 1100)),
    "image_tiny": picture(0, (13, 20)),
}


@pytest.mark.parametrize("code", IMAGES)
def test_an_image_that_is_wrong(code, encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[code])
    (finding,) = findings_of(tmp_path, question(0, "a.png"), encoder)
    assert (finding.code, finding.severity) == (code, CODES[code][0])
    assert (finding.id, finding.row, finding.source) == ("s0", 0, "t.jsonl")
    assert finding.origin == f"{tmp_path / 't.jsonl'}:1"
    assert finding.sentence.startswith(f"{finding.origin} (sample s0): image ") and "a.png" in finding.sentence


def test_a_bomb_below_pillows_own_limit_is_one_too(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(11_000))
    assert [f.code for f in findings_of(tmp_path, question(0, "a.png"), encoder)] == ["image_bomb"]


def test_a_line_of_one_pixel_is_tiny_and_extreme_and_still_encodes(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0, (1, 1000)))
    (row,) = checked(write_jsonl(tmp_path / "t.jsonl", [question(0, "a.png")]), encoder)
    assert [f.code for f in row.findings] == ["image_aspect", "image_tiny"] and row.tokens


def test_every_image_of_a_row_has_its_own_finding(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no image")
    row = {"id": "s0", "images": ["a.png", "b.png"], "question": "Same?", "answer": "No."}
    (row,) = checked(write_jsonl(tmp_path / "t.jsonl", [row]), encoder)
    assert [f.code for f in row.findings] == ["image_empty", "image_corrupt"]
    assert row.tokens is None and row.content is None


@pytest.mark.parametrize(
    ("code", "row", "words"),
    [
        ("image_missing", question(0, "gone.png"), "gone.png not found"),
        ("reply_empty", question(0, answer=" "), "no assistant text"),
        ("reply_empty", {"messages": [{"role": "user", "content": "a"}]}, "no assistant text"),
        ("reply_empty", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                      {"role": "assistant", "content": ""}]}, "message 3 is empty"),
        ("reply_empty", {"messages": [{"role": "user", "content": "a"},
                                      {"role": "assistant", "content": "b", "train": False}]}, "no assistant reply"),
        ("role_unknown", {"messages": [{"role": "tool", "content": "a"}]}, "unknown role 'tool'"),
        ("unreadable", {"text": "a"}, "a row needs 'messages'"),
        ("unreadable", [1], "a row is a JSON object"),
        ("unencodable", question(0, answer="\ufdd0"), "reserved by Unicode"),
        ("box_outside", answered_by_box([0, 0, 42, 10]), "sticks out of its image of 40x30"),
        ("box_flat", answered_by_box([5, 5, 5, 10]), "has no area"),
        ("box_order", answered_by_box([20, 12, 14, 10]), "as in COCO"),
        ("box_fraction", answered_by_box([0.1, 0.1, 0.9, 0.5]), "in fractions of the image"),
        ("image_in_reply", {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
                                         {"role": "user", "content": "red"}]}, "exchange the roles"),
        ("text_broken", question(0, answer="grÃ¶ÃŸer"), "another encoding"),
        ("text_marker", question(0, answer="red<|im_end|>"), "looks like the marker"),
        ("box_text", question(0, "a.png", answer="[1, 2, 30, 20]"), "write a box part"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong(code, row, words, encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (finding,) = findings_of(tmp_path, row, encoder)
    assert finding.code == code and words in finding.sentence
    assert f"{tmp_path / 't.jsonl'}:1" in finding.sentence
    assert finding.id == (row if isinstance(row, dict) else {}).get("id", "t/0")


def test_a_box_may_end_where_its_image_does(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    assert not findings_of(tmp_path, answered_by_box([0, 0, 40, 30]), encoder)


def test_a_click_outside_is_a_box_outside(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    row = answered_by_box([0, 0, 1, 1])
    row["messages"][1]["content"] = [{"type": "point", "points": [[100, 5]], "click": True}]
    assert [f.code for f in findings_of(tmp_path, row, encoder)] == ["box_outside"]


def test_too_long_is_as_severe_as_what_training_does_about_it(encoder, tmp_path):
    row = question(0, answer="a cat " * 50)
    (finding,) = findings_of(tmp_path, row, encoder, max_length=40)
    assert (finding.code, finding.severity) == ("too_long", "error") and "data.max_length 40" in finding.sentence
    (finding,) = findings_of(tmp_path, row, encoder, max_length=40, refuses_overlong=False)
    assert (finding.code, finding.severity) == ("too_long", "warning")
    assert not findings_of(tmp_path, row, encoder, max_length=None)


def test_a_line_that_is_no_json_has_no_id_and_the_next_one_is_checked(encoder, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": broken\n' + json.dumps(question(1)) + "\n")
    broken, good = checked(path, encoder)
    assert [(f.code, f.id, f.origin) for f in broken.findings] == [("unreadable", None, "t.jsonl, row 1")]
    assert f"{path}:1: not valid JSON" in broken.findings[0].sentence and not good.findings


def test_a_processor_that_fails_in_its_own_way_is_a_finding(encoder, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise ZeroDivisionError("by zero")

    (tmp_path / "a.png").write_bytes(picture(0))
    monkeypatch.setattr(encoder.pictures, "process", fail)
    (finding,) = findings_of(tmp_path, question(0, "a.png"), encoder)
    assert finding.code == "unencodable" and "ZeroDivisionError: by zero" in finding.sentence


@pytest.fixture
def mixed(tmp_path) -> Path:
    """70 rows, three chunks, with an error here and there."""
    rows = []
    for n in range(70):
        (tmp_path / f"{n}.png").write_bytes(b"" if n % 9 == 4 else picture(n))
        rows.append(question(n, f"{n}.png" if n % 7 else "gone.png"))
    return write_jsonl(tmp_path / "t.jsonl", rows)


def test_workers_change_nothing(encoder, mixed):
    alone, together = checked(mixed, encoder), checked(mixed, encoder, workers=2)
    assert alone == together and [row.row for row in alone] == list(range(70))
    assert sum(bool(row.findings) for row in alone) == 17


# ---- what rows have in common -----------------------------------------------------------------------------------


def shared(encoder: Encoder, *places: tuple[Path, str]) -> list[tuple]:
    """(code, source, id, id of the other) of all that occurs twice. places: (file, split)."""
    sources = [SplitSource(FileSource(path), path.name, split) for path, split in places]
    duplicates = Duplicates(sources)
    for number, place in enumerate(sources):
        for row in check_rows(RowCheck(place.source, place.name, encoder)):
            duplicates.add(number, row)
    found = duplicates.findings()
    return [(f.code, f.source, f.id, f.sentence.rpartition("(sample ")[2].partition(")")[0]) for f in found]


def test_two_short_replies_to_one_question_contradict_each_other(encoder, tmp_path):
    for name, seed in (("a.png", 0), ("b.png", 1)):
        (tmp_path / name).write_bytes(picture(seed))
    asked = {"question": "What colour?", "image": "a.png"}
    rows = [
        {**asked, "id": "one", "answer": "red"}, {**asked, "id": "two", "answer": "Red."},
        {**asked, "id": "three", "answer": "blue"}, {**asked, "id": "four", "image": "b.png", "answer": "blue"},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert shared(encoder, (path, "train")) == [("contradiction", "t.jsonl", "three", "one")]
    other = write_jsonl(tmp_path / "v.jsonl", [rows[2]])
    train = write_jsonl(tmp_path / "u.jsonl", rows[:1])
    assert [code for code, *_ in shared(encoder, (train, "train"), (other, "eval/v"))] == ["leak_image"], (
        "within one split alone"
    )


def test_a_duplicate_row_is_one_whatever_its_id_task_and_file_of_the_image(encoder, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(0))
    (tmp_path / "c.png").write_bytes(picture(1))
    rows = [question(0, "a.png"), question(0, "b.png", id="again", task="vqa"), question(0, "c.png", id="other")]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert shared(encoder, (path, "train")) == [("duplicate_row", "t.jsonl", "again", "s0")]


def test_other_words_another_role_or_no_loss_make_another_row(encoder, tmp_path):
    def talk(*turns: tuple) -> dict:
        return {"messages": [{"role": role, "content": text} | more for role, text, more in turns]}

    rows = [
        talk(("user", "a", {}), ("assistant", "b", {}), ("user", "c", {}), ("assistant", "d", {})),
        talk(("user", "a", {}), ("assistant", "b", {"train": False}), ("user", "c", {}), ("assistant", "d", {})),
        talk(("user", "a", {}), ("assistant", "b", {}), ("user", "c", {}), ("assistant", "e", {})),
        talk(("system", "a", {}), ("user", "a", {}), ("assistant", "b", {})),
    ]
    assert not shared(encoder, (write_jsonl(tmp_path / "t.jsonl", rows), "train"))


def test_one_picture_may_have_many_questions_but_not_two_files(encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b.bmp").write_bytes(picture(0, kind="BMP"))
    rows = [question(n, "b.bmp" if n in (2, 3) else "a.png") for n in range(5)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert shared(encoder, (path, "train")) == [("duplicate_image", "t.jsonl", "s2", "s0")]


def test_pictures_inside_a_table_are_told_apart_by_their_bytes(encoder, tmp_path):
    one, same, other = picture(0), picture(0, kind="BMP"), picture(1)
    rows = [question(n) | {"image": {"bytes": data, "path": "x"}} for n, data in enumerate([one, one, same, other])]
    path = write_parquet(tmp_path / "t.parquet", rows)
    assert shared(encoder, (path, "train")) == [("duplicate_image", "t.parquet", "s2", "s0")]


def test_held_out_samples_and_images_that_are_in_the_training_data(encoder, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    train = write_jsonl(tmp_path / "t.jsonl", [question(0, "0.png"), question(1, "1.png")])
    held = [question(0, "0.png", id="v0"), question(8, "1.png", id="v1"), question(9, "2.png", id="v2")]
    val, test = write_jsonl(tmp_path / "val.jsonl", held), write_jsonl(tmp_path / "test.jsonl", held[2:])
    assert shared(encoder, (train, "train"), (val, "eval/val"), (test, "eval/test")) == [
        ("leak", "val.jsonl", "v0", "s0"),
        ("leak_image", "val.jsonl", "v1", "s1"),
    ]


def test_first_equal_agrees_with_a_dictionary():
    keys = np.random.default_rng(0).integers(0, 4, (500, 3)).astype(np.uint64)
    first: dict[tuple, int] = {}
    expected = [first.setdefault(tuple(key), n) for n, key in enumerate(keys.tolist())]
    assert first_equal(keys).tolist() == expected
    assert first_equal(np.zeros((0, 3), dtype=np.uint64)).tolist() == []


def test_every_code_is_tested_here():
    names = ("test_check.py", "test_habits.py", "test_suspicions.py")
    text = "".join(Path(__file__).with_name(name).read_text() for name in names)
    assert not [code for code in CODES if f'"{code}"' not in text]


def test_the_guide_lists_every_code_and_its_severity():
    page = (Path(__file__).parents[3] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (error|warning) \|", page, re.MULTILINE))
    assert listed == {code: severity for code, (severity, _) in CODES.items()}

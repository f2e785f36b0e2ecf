"""Every container gives the same samples, by index, in any process, and says what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from files_on_disk import (
    REPLY,
    picture_row,
    png,
    text_row,
    user,
    write_hub_cache,
    write_jsonl,
    write_parquet,
    write_tar,
)

from vlmtune.data.files import open_reader
from vlmtune.data.sources import FileSource
from vlmtune.errors import VlmtuneError
from vlmtune.types import Boxes, ImageRef, Text, Turn

COLOURS = ("red", "green", "blue", "white", "black")
ANSWERS = [f"It is {colour}." for colour in COLOURS]
TURNS = [
    (Turn("user", (ImageRef(png(colour)), Text("Which colour?"))), Turn("assistant", (Text(answer),)))
    for colour, answer in zip(COLOURS, ANSWERS, strict=True)
]


def question_rows() -> list[dict]:
    return [
        {"question": "Which colour?", "answer": answer, "image": {"bytes": png(colour), "path": None}}
        for colour, answer in zip(COLOURS, ANSWERS, strict=True)
    ]


# ---- one container after the other ------------------------------------------------------------------------------


def make_parquet(folder: Path) -> FileSource:
    return FileSource(write_parquet(folder / "a.parquet", question_rows(), row_group_size=2))


def make_parquet_of_plain_bytes(folder: Path) -> FileSource:
    rows = [row | {"image": row["image"]["bytes"]} for row in question_rows()]
    return FileSource(write_parquet(folder / "a.parquet", rows))


def make_parquet_folder(folder: Path) -> FileSource:
    rows = question_rows()
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(folder / "train-00001-of-00002.parquet", rows[2:])
    write_parquet(folder / "test-00000-of-00001.parquet", rows[:1])
    return FileSource(folder)


def make_saved(folder: Path) -> FileSource:
    import datasets

    datasets.Dataset.from_list(question_rows()).save_to_disk(str(folder / "saved"))
    return FileSource(folder / "saved")


def make_saved_splits(folder: Path) -> FileSource:
    import datasets

    images = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    data = datasets.Dataset.from_list(question_rows(), features=images)
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(folder / "saved"))
    return FileSource(folder / "saved", split="test")


def make_tar(folder: Path) -> FileSource:
    members = {}
    for number, row in enumerate(question_rows()):
        members[f"shard/{number:04d}.png"] = row["image"]["bytes"]
        members[f"shard/{number:04d}.json"] = json.dumps(
            {"question": row["question"], "answer": row["answer"]}
        ).encode()
        members[f"shard/{number:04d}.cls"] = b"3"
    return FileSource(write_tar(folder / "a.tar", members))


def make_tar_folder(folder: Path) -> FileSource:
    for shard in range(5):
        row = question_rows()[shard]
        about = {"messages": [user({"type": "image", "image": "0.png"}, {"type": "text", "text": "Which colour?"})]}
        about["messages"].append({"role": "assistant", "content": row["answer"]})
        write_tar(folder / f"shard-{shard}.tar", {"0.png": row["image"]["bytes"], "0.json": json.dumps(about).encode()})
    return FileSource(folder)


def make_json_column(folder: Path) -> FileSource:
    """`datasets` keeps content that is now text and now a list as JSON with a type of its own."""
    import datasets
    from datasets import Features, Image, Json, List, Value

    rows = [
        {
            "messages": [
                user({"type": "image"}, {"type": "text", "text": row["question"]}),
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [row["image"]],
        }
        for row in question_rows()
    ]
    features = Features({"messages": List({"role": Value("string"), "content": Json()}), "images": List(Image())})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "a.parquet"))
    return FileSource(folder / "a.parquet")


MAKERS = {
    make_parquet: "questions and answers, parquet, 5 rows",
    make_parquet_of_plain_bytes: "questions and answers, parquet, 5 rows",
    make_parquet_folder: "questions and answers, parquet in 2 files, 5 rows",
    make_saved: "questions and answers, saved data set, 5 rows",
    make_saved_splits: "questions and answers, saved data set, 5 rows",
    make_tar: "questions and answers, WebDataset tar (members not read: .cls), 5 rows",
    make_tar_folder: "OpenAI messages with an image field, WebDataset tar in 5 files, 5 rows",
    make_json_column: "OpenAI messages with an image field, parquet, 5 rows",
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_every_container_holds_the_same_samples(make, tmp_path):
    source = make(tmp_path)
    assert source.size == 5 and source.format == MAKERS[make]
    order = [3, 0, 4, 1, 2, 3]  # random access, across groups, files and members, and again
    assert [source[i].turns for i in order] == [TURNS[i] for i in order]
    ids = [source[i].id for i in range(5)]
    assert len(set(ids)) == 5 or make is make_tar_folder  # there the keys are the user's own
    assert all(str(tmp_path) in source[i].origin for i in range(5))


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_a_forked_worker_reads_the_same(make, tmp_path):
    """Handles and caches were used before the fork, as the first batch's page does."""
    source = make(tmp_path)
    before = [source[i] for i in (0, 4)]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        same = [source[i] for i in (0, 4)] == before and [source[i].turns for i in range(5)] == TURNS
        os.write(writing, b"same" if same else b"other")
        os._exit(0)
    assert [source[i].turns for i in range(4, -1, -1)] == TURNS[::-1]  # both read at the same time
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(reading, 9) == b"same"


def test_a_hub_data_set_comes_from_the_cache_of_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    write_hub_cache(tmp_path, "owner/name", question_rows())
    for name in ("hub:owner/name", "hub:owner/name/default"):
        source = FileSource(name)
        assert source.format == "questions and answers, hub data set, 5 rows"
        assert [source[i].turns for i in (4, 0)] == [TURNS[4], TURNS[0]]
        assert source[2].origin == f"{name}/train:3" and source.name == "owner/name/train"


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_text(tmp_path, ending, separator):
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        ["id", "image", "question", "answer", "boxes", "note"],
        ["r1", "a.png", "What is\nit?", '"A ""red"" square"', "", "ignored"],
        ["r2", "", "Grüß Gott?", "Ja", "", ""],
        ["r3", "a.png", "Where?", "", "[[0; 1; 2; 3]]".replace(";", ","), ""],
    ]
    quoted = [[f'"{cell}"' if ("\n" in cell or "," in cell) else cell for cell in line] for line in lines]
    text = "\r\n".join(separator.join(line) for line in quoted) + "\r\n\r\n"
    (tmp_path / f"t.{ending}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = FileSource(tmp_path / f"t.{ending}")
    assert source.format == f"questions and answers, {ending.upper()}, 3 rows"
    picture = ImageRef(tmp_path / "a.png")
    assert [source[i].turns for i in (2, 0, 1)] == [
        (Turn("user", (picture, Text("Where?"))), Turn("assistant", (Boxes(((0, 1, 2, 3),)),))),
        (Turn("user", (picture, Text("What is\nit?"))), Turn("assistant", (Text('A "red" square'),))),
        (Turn("user", (Text("Grüß Gott?"),)), Turn("assistant", (Text("Ja"),))),
    ]
    assert [source[i].id for i in range(3)] == ["r1", "r2", "r3"]
    assert [source[i].origin.rsplit(":", 1)[1] for i in range(3)] == ["2", "4", "5"]  # lines, not records


def test_an_image_in_a_cell_may_be_long(tmp_path):
    """Python's own limit for a cell is 131,072 characters."""
    import base64
    import csv

    url = "data:image/png;base64," + base64.b64encode(png() + b"\0" * 200_000).decode()
    (tmp_path / "t.csv").write_text(f'image,question,answer\n"{url}",What?,That.\n')
    limit = csv.field_size_limit()
    assert FileSource(tmp_path / "t.csv")[0].images == [ImageRef(png() + b"\0" * 200_000)]
    assert csv.field_size_limit() == limit


# ---- archives ---------------------------------------------------------------------------------------------------


def test_captions_and_conversations_in_one_archive(tmp_path):
    same = {"question": "Same?", "answer": "No"}
    llava = {
        "image": "b.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "B."}],
    }
    members = {
        "a.jpg": png("red"), "a.txt": b"\xef\xbb\xbfA red picture.\n", "a.json": b'{"url": "http://x", "width": 8}',
        "b.png": png("blue"), "b.json": json.dumps(llava).encode(),
        "c.left.png": png("red"), "c.right.png": png("green"), "c.json": json.dumps(same).encode(),
        "d.json": json.dumps({"id": "own", "messages": [user("Hi"), REPLY]}).encode(),
    }  # fmt: skip
    source = FileSource(write_tar(tmp_path / "mixed.tar", members))
    assert [source[i].turns for i in range(4)] == [
        (Turn("user", (ImageRef(png("red")),)), Turn("assistant", (Text("A red picture."),))),
        (Turn("user", (ImageRef(png("blue")), Text("What?"))), Turn("assistant", (Text("B."),))),
        (Turn("user", (ImageRef(png("red")), ImageRef(png("green")), Text("Same?"))), Turn("assistant", (Text("No"),))),
        (Turn("user", (Text("Hi"),)), Turn("assistant", (Text("A red square."),))),
    ]
    assert [source[i].id for i in range(4)] == ["mixed/a", "mixed/b", "mixed/c", "own"]
    assert source[2].origin == f"{tmp_path}/mixed.tar:c"


def test_long_and_foreign_names_in_an_archive(tmp_path):
    """Longer than the 100 bytes of a header, and beyond ASCII: tar keeps such names in blocks of their own."""
    stem = "ordner/" + "ü" * 90 + "/" + "n" * 120
    source = FileSource(write_tar(tmp_path / "a.tar", {f"{stem}.png": png(), f"{stem}.txt": b"Red."}))
    assert source[0].images == [ImageRef(png())] and source[0].origin.endswith(stem)


def test_an_index_of_an_archive_is_bounded(tmp_path):
    """tarfile would keep an object for every member."""
    members = {f"{i:05d}.txt": b"x" for i in range(3000)}
    write_tar(tmp_path / "a.tar", {"x.png": png(), **members})
    import tracemalloc

    tracemalloc.start()
    reader = open_reader(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.size == 3001
    assert peak < 1_000_000  # 3001 TarInfo objects alone are 3 MB


# ---- parquet ----------------------------------------------------------------------------------------------------


def test_row_groups_are_kept_within_a_limit_of_bytes(tmp_path, monkeypatch):
    from vlmtune.data import tables

    path = write_parquet(tmp_path / "a.parquet", question_rows(), row_group_size=1)
    reads = []
    reader = tables.Parquet(path)
    monkeypatch.setattr(tables, "CACHED_BYTES", 2 * reader._group(0).nbytes + 20)
    group = reader._open[1].read_row_group
    monkeypatch.setattr(
        type(reader._open[1]), "read_row_group", lambda self, n, **k: (reads.append(n), group(n, **k))[1]
    )
    for index in (0, 1, 0, 2, 0, 1):
        assert reader.row(index).value["answer"] == ANSWERS[index]
    assert reads == [1, 2, 1]  # two groups fit; 0 was used last when 2 came, so 1 had to go
    assert len(reader._groups) == 2


def test_columns_nobody_asks_for_stay_on_disk(tmp_path):
    rows = [row | {"depth": b"x" * 1000, "id": 7} for row in question_rows()]
    reader = open_reader(write_parquet(tmp_path / "a.parquet", rows))
    assert set(reader.row(0).value) == {"question", "answer", "image", "id"}


def test_messages_as_json_text_in_a_table(tmp_path):
    """A column of plain text: some tools write conversations so."""
    rows = [
        {"messages": json.dumps([user("Hi"), REPLY])},
        {"messages": json.dumps(picture_row(str(tmp_path / "a.png"))["messages"])},
    ]
    (tmp_path / "a.png").write_bytes(png())
    source = FileSource(write_parquet(tmp_path / "a.parquet", rows))
    assert source[0].turns[0].parts == (Text("Hi"),) and len(source[1].images) == 1


def test_text_one_image_and_many_images_in_one_table(tmp_path):
    """Arrow fills absent fields of parts with null; `messages` and `images` of every length mix."""
    image = {"type": "image", "text": None, "index": None}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "images": []},
        {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}], "images": ["red"]},
        {
            "messages": [
                {"role": "user", "content": [image | {"index": 1}, image | {"index": 0}, {"type": "text", "text": "?"}]}
            ],
            "images": ["red", "blue"],
        },
    ]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "Yes."}]})
        row["images"] = [{"bytes": png(colour), "path": None} for colour in row["images"]]
    source = FileSource(write_parquet(tmp_path / "a.parquet", rows))
    assert [[ref.source for ref in source[i].images] for i in range(3)] == [[], [png("red")], [png("blue"), png("red")]]


def test_a_path_in_a_table_starts_from_its_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"question": "What?", "answer": "Red.", "image": {"bytes": None, "path": "a.png"}}]
    assert FileSource(write_parquet(tmp_path / "a.parquet", rows))[0].images == [ImageRef(tmp_path / "a.png")]


def test_large_files_are_spoken_of(tmp_path, monkeypatch):
    from vlmtune.data import files, tables

    monkeypatch.setattr(files, "LARGE_LIST", 10)
    monkeypatch.setattr(tables, "LARGE_GROUP", 10)
    (tmp_path / "a.json").write_text(json.dumps([text_row()]))
    write_parquet(tmp_path / "a.parquet", question_rows())
    assert "held in memory by every process (as .jsonl it would stay on disk)" in FileSource(tmp_path / "a.json").format
    assert "row groups of up to" in FileSource(tmp_path / "a.parquet").format


def test_without_the_extra_the_command_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "a.parquet", "hub:owner/name"):
        with pytest.raises(
            VlmtuneError, match=r'reading this needs (pyarrow|datasets); run: pip install "vlmtune\[data\]"'
        ):
            FileSource(path)


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_its_files_in_order_and_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name, first in (("data/train-1.jsonl", 2), ("data/train-0.jsonl", 0), ("data/val.jsonl", 9)):
        write_jsonl(tmp_path / name, [text_row(first), text_row(first + 1)])
    (tmp_path / ".hidden.csv").write_text("x")
    train = FileSource(tmp_path)
    assert [train[i].id for i in range(train.size)] == ["row-0", "row-1", "row-2", "row-3"]
    assert train.format == "OpenAI messages, JSONL in 2 files, 4 rows" and train.name == tmp_path.name
    assert [FileSource(tmp_path, split="validation")[i].id for i in range(2)] == ["row-9", "row-10"]
    assert [FileSource(tmp_path, split="val")[i].id for i in range(2)] == ["row-9", "row-10"]


def test_the_format_is_that_of_the_first_row_and_names_the_limit(tmp_path):
    qwen = {
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
            {"from": "assistant", "value": "A"},
        ]
    }
    llava = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]}
    for row, name in ((qwen, "Qwen-VL conversations"), (llava, "LLaVA / ShareGPT conversations")):
        source = FileSource(write_jsonl(tmp_path / "a.jsonl", [row] * 1204), limit=10)
        assert source.format == f"{name}, JSONL, 1,204 rows, the first 10 used" and source.size == 10

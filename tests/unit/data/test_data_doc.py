"""docs/guide/data.md: every example on the page is what it says, loaded as a user would load it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from files_on_disk import png

from vlmtune.data.files import ENDINGS
from vlmtune.data.images import load_image
from vlmtune.data.rows import CONTENT, FIELDS, REFUSED
from vlmtune.data.sources import FileSource
from vlmtune.types import Boxes, Sample

PAGE = (Path(__file__).parents[3] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
EXAMPLES = {name: (language, code) for language, name, code in re.findall(r"```(\w+) (\S+)\n(.*?)```", PAGE, re.DOTALL)}
FORMATS = {
    "train.jsonl": "OpenAI messages, JSONL, 2 rows",
    "llava.json": "LLaVA / ShareGPT conversations, JSON list, 2 rows",
    "qwen.json": "Qwen-VL conversations, JSON list, 1 rows",
    "questions.csv": "questions and answers, CSV, 3 rows",
    "found.tsv": "questions and answers, TSV, 1 rows",
    "questions.jsonl": "questions and answers, JSONL, 2 rows",
    "captions.jsonl": "captions, JSONL, 1 rows",
    "shard-000000.tar": "questions and answers, WebDataset tar, 2 rows",
    "table.parquet": "OpenAI messages with an image field, parquet, 2 rows",
    "saved": "questions and answers, saved data set, 1 rows",
}
IMAGES = {
    "train.jsonl": [1, 1], "llava.json": [1, 2], "qwen.json": [2], "questions.csv": [1, 1, 0], "found.tsv": [1],
    "questions.jsonl": [1, 2], "captions.jsonl": [1], "shard-000000.tar": [1, 1], "table.parquet": [1, 0], "saved": [1],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("kitchen", "street", "cat"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, name: str) -> tuple[FileSource, list[Sample]]:
    language, code = EXAMPLES[name]
    if language == "python":
        exec(compile(code, name, "exec"), {})
    else:
        (folder / name).write_text(code, encoding="utf-8")
    source = FileSource(folder / name)
    return source, [source[index] for index in range(source.size)]


def test_every_example_is_tested_and_every_ending_has_one():
    assert set(EXAMPLES) == set(FORMATS) == set(IMAGES)
    assert {Path(name).suffix for name in EXAMPLES} == {*ENDINGS, ""}


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_loads_as_what_it_says(name, folder):
    source, samples = load(folder, name)
    assert source.format == FORMATS[name]
    assert [len(sample.images) for sample in samples] == IMAGES[name]
    for sample in samples:
        assert all(load_image(image.source, sample.origin).size == (8, 4) for image in sample.images)


README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
README_FORMATS = {
    "messages.jsonl": "OpenAI messages, JSONL, 1 rows",
    "llava.json": "LLaVA / ShareGPT conversations, JSON list, 1 rows",
    "qwen.json": "Qwen-VL conversations, JSON list, 1 rows",
    "questions.csv": "questions and answers, CSV, 1 rows",
    "shard.tar": "captions, WebDataset tar, 1 rows",
    "table.parquet": "questions and answers, parquet, 1 rows",
}


@pytest.mark.parametrize("name", README_FORMATS)
def test_an_example_of_the_readme_loads(name, folder):
    (folder / "caption.txt").write_text("A cat.")
    language, code = re.search(rf"```(\w+) {re.escape(name)}\n(.*?)```", README, re.DOTALL).groups()
    if language == "python":
        exec(compile(code, name, "exec"), {})
    else:
        (folder / name).write_text(code, encoding="utf-8")
    source = FileSource(folder / name)
    assert source.format == README_FORMATS[name]
    assert [load_image(image.source, "readme").size for image in source[0].images] == [(8, 4)]


def test_boxes_of_the_examples(folder):
    for name in ("train.jsonl", "found.tsv"):
        _, samples = load(folder, name)
        assert [p for t in samples[0].turns for p in t.parts if isinstance(p, Boxes)] == [Boxes(((120, 80, 260, 310),))]


def test_every_field_and_ending_stands_on_the_page():
    for name in (*FIELDS, *REFUSED, *CONTENT):
        assert f"`{name}`" in PAGE, name
    for ending in ENDINGS:
        assert f"`x{ending}`" in PAGE, ending


def test_the_laid_out_row_is_the_first_one_of_the_file(folder):
    import json

    laid_out = re.search(r"The first row, laid out:\n\n```json\n(.*?)```", PAGE, re.DOTALL)[1]
    assert json.loads(laid_out) == json.loads(EXAMPLES["train.jsonl"][1].splitlines()[0])

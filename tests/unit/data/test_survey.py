"""Lengths before training: every row is counted, what is too long is said, trimmed, or left out, and never replaced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from files_on_disk import png

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.sources import FileSource
from vlmtune.data.survey import (
    FittedSource,
    change_records,
    fitted_sample,
    refuse_overlong,
    survey_source,
)
from vlmtune.data.window import Window
from vlmtune.models.load import load_processor
from vlmtune.types import Kind, VlmtuneError

LONG = "It is a cat. It sits on the sill. " + "It looks at the street and does not move at all. " * 4


@pytest.fixture
def encoder(tiny_folder) -> Encoder:
    return Encoder(load_processor(str(tiny_folder("qwen2_5_vl"))), coordinates("norm1000"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows 0, 3, 6, … are short; 1, 4, … have a reply that is too long; 2, 5, … a question that is."""
    (tmp_path / "0.png").write_bytes(png())
    rows = []
    for n in range(9):
        question, reply = [("what", "a cat"), ("what", LONG), ("word " * 200, "a cat")][n % 3]
        rows.append({"id": f"s{n}", "image": "0.png", "question": question, "answer": reply})
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def limit_of(encoder: Encoder, source: FileSource) -> int:
    return encoder.count(source[0]) + 60


def test_trimming_drops_and_changes_what_the_survey_said(encoder, data):
    source = FileSource(data)
    window = Window(limit_of(encoder, source), 8)
    survey = survey_source(source, encoder, window)
    assert survey.tokens.tolist() == [len(encoder.encode(source[n])) for n in range(9)]
    assert [(o.row, o.actions) for o in survey.overlong] == [
        (n, ("reply",) if n % 3 == 1 else ("dropped",)) for n in (1, 2, 4, 5, 7, 8)
    ]
    assert "6 of 9 samples exceed" in survey.sentence(window.max_length)
    assert "reply cut (3), dropped whole (3)" in survey.sentence(window.max_length)

    fitted = FittedSource(source, survey, encoder, window, "trim")
    assert [fitted[n].id for n in range(fitted.size)] == ["s0", "s1", "s3", "s4", "s6", "s7"]
    assert fitted[0] == source[0]
    for n in range(fitted.size):
        encoded = encoder.encode(fitted[n])
        assert len(encoded) <= window.max_length
        if fitted_sample(fitted, n).changes:
            text = encoder.tokenizer.decode(encoded.ids[encoded.supervised()])
            assert LONG.startswith(text) and text.endswith(".")  # whole sentences, and no end-of-turn token
            assert encoded.kinds[encoded.turn == 1][-1] == Kind.UNTRAINED
    left_out, changed = change_records("t.jsonl", survey, "trim")
    assert [row["id"] for row in left_out] == ["s2", "s5", "s8"]
    assert [row["id"] for row in changed] == ["s1", "s4", "s7"]
    assert all(row["origin"].startswith(f"{data}:") and row["tokens"] > window.max_length for row in left_out + changed)


def test_dropping_leaves_out_all_that_is_too_long(encoder, data):
    source = FileSource(data)
    window = Window(limit_of(encoder, source), 8)
    survey = survey_source(source, encoder, window)
    fitted = FittedSource(source, survey, encoder, window, "drop")
    assert [fitted[n] for n in range(fitted.size)] == [source[0], source[3], source[6]]
    left_out, changed = change_records("t.jsonl", survey, "drop")
    assert len(left_out) == 6 and not changed


def test_the_complaint_counts_and_names(encoder, data):
    source = FileSource(data)
    window = Window(limit_of(encoder, source), 8)
    survey = survey_source(source, encoder, window)
    with pytest.raises(VlmtuneError) as caught:
        refuse_overlong([("t.jsonl", survey)], window.max_length)
    message = str(caught.value)
    assert message.startswith(f"t.jsonl: 6 of 9 samples exceed {window.max_length} tokens")
    assert f"{data}:2 (sample s1): {survey.tokens[1]} tokens" in message
    assert message.endswith("Raise data.max_length, or set data.on_overlong to trim or drop.")
    refuse_overlong([("t.jsonl", survey_source(source, encoder, Window(10**6)))], 10**6)


@pytest.mark.parametrize("drop_bad", [False, True])
def test_counting_does_not_move_the_training_rng(encoder, data, drop_bad):
    """Else a run whose counts are in the cache would draw another dropout than the first one."""
    before = torch.get_rng_state()
    survey_source(FileSource(data), encoder, Window(10**6), drop_bad=drop_bad)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_left_is_refused(encoder, data):
    source = FileSource(data)
    survey = survey_source(source, encoder, Window(10))
    with pytest.raises(VlmtuneError, match=r"t\.jsonl: every sample exceeds data.max_length 10"):
        FittedSource(source, survey, encoder, Window(10), "trim")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_the_cache_change_nothing(encoder, data, tmp_path, workers, monkeypatch):
    source = FileSource(data)
    window = Window(limit_of(encoder, source), 8)
    seen: list[int] = []
    first = survey_source(source, encoder, window, tmp_path / "cache", workers, seen.append)
    assert seen == [9] and len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(Encoder, "count", None)  # the second time nothing is counted
    again = survey_source(FileSource(data), encoder, window, tmp_path / "cache", workers)
    assert np.array_equal(first.tokens, again.tokens) and first.overlong == again.overlong


def test_other_data_another_limit_or_other_pixels_are_counted_anew(encoder, data, tmp_path, tiny_folder):
    cache = tmp_path / "cache"
    survey_source(FileSource(data), encoder, Window(100), cache)
    survey_source(FileSource(data), encoder, Window(101), cache)
    smaller = load_processor(str(tiny_folder("qwen2_5_vl")))
    smaller.image_processor.size["longest_edge"] = 28 * 28 * 4
    survey_source(FileSource(data), Encoder(smaller, coordinates("norm1000")), Window(100), cache)
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert len(survey_source(FileSource(data), encoder, Window(100), cache).tokens) == 10
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_cache_is_counted_anew(encoder, data, tmp_path):
    first = survey_source(FileSource(data), encoder, Window(100), tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    (kept / "numbers.npy").write_bytes(b"")
    again = survey_source(FileSource(data), encoder, Window(100), tmp_path / "cache")
    assert np.array_equal(first.tokens, again.tokens)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_stops_the_count(encoder, data, workers):
    (data.parent / "0.png").unlink()
    with pytest.raises(VlmtuneError, match=r"t\.jsonl:1 \(sample s0\).*0\.png not found"):
        survey_source(FileSource(data), encoder, Window(100), workers=workers)


def test_a_sample_that_grew_after_the_count_is_an_error_not_a_substitute(encoder, data, monkeypatch):
    source = FileSource(data)
    window = Window(limit_of(encoder, source), 8)
    fitted = FittedSource(source, survey_source(source, encoder, window), encoder, window, "trim")
    count = encoder.count
    monkeypatch.setattr(encoder, "count", lambda sample: count(sample) + 1000)  # as after an image was exchanged
    assert fitted[0] == source[0]  # the encoder checks those that fitted as they were
    with pytest.raises(VlmtuneError, match=r"t\.jsonl:2 \(sample s1\): it could be trimmed .* its images changed"):
        fitted[1]

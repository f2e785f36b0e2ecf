"""Negatives against what is in the image: names that are absent, places that are empty, answers that are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_setup import png

from vlmtune.build import build_train, negative_shares
from vlmtune.config import Data, Negatives, Source
from vlmtune.data.negatives import NegativeSource, negative, objects_of
from vlmtune.data.scenes import SceneRecipe
from vlmtune.data.sources import FileSource, SceneSource
from vlmtune.evaluate.boxes import iou
from vlmtune.types import Boxes, ImageRef, Text, VlmtuneError

VERIFY, WHAT = "Is {name} in {region}?", "What is in {region}?"
NAMES = SceneSource("base", "grounding", "train").names()
RECIPE = SceneRecipe("base")


def text_of(turn) -> str:
    return "".join("[region]" if isinstance(p, Boxes) else p.text for p in turn.parts if not isinstance(p, ImageRef))


def made(task: str, index: int, kind: str):
    sample = RECIPE.sample(task, index, "train")
    return sample, negative(sample, kind, NAMES, VERIFY, WHAT)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.sampled_from(["hard", "random"]))
def test_detection_asks_for_what_is_absent_with_the_same_words(index, kind):
    sample, new = made("grounding", index, kind)
    question, reply = (text_of(turn) for turn in new.turns)
    assert question.startswith("Find ") and question.endswith(".") and reply == "none"
    name = question.removeprefix("Find ").removesuffix(".")
    assert name in NAMES and name not in {thing.name for thing in objects_of(sample)}
    if kind == "hard":
        asked = text_of(sample.turns[0]).removeprefix("Find ").removesuffix(".")
        kinds = (
            {NAMES[asked]} if asked in {t.name for t in objects_of(sample)} else {t.kind for t in objects_of(sample)}
        )
        assert NAMES[name] in kinds
    assert new.images == sample.images and new.task == f"grounding_{kind}" and new.id == f"{sample.id}/{kind}"
    assert made("grounding", index, kind)[1] == new, "a pure function"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.sampled_from(["hard", "random", "confirmed"]))
def test_referring_asks_whether_a_name_is_there(index, kind):
    sample, new = made("referring", index, kind)
    question, reply = (text_of(turn) for turn in new.turns)
    truth = sample.meta["answer"]
    name = question.removeprefix("Is ").removesuffix(" in [region]?")
    assert (name == truth) == (kind == "confirmed") and reply == ("yes" if kind == "confirmed" else "no")
    region = next(part for part in new.turns[0].parts if isinstance(part, Boxes))
    assert region.region and [list(box) for box in region.boxes] == sample.meta["boxes"]
    if kind == "hard":
        assert NAMES[name] == NAMES[truth]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.sampled_from(["grounding", "referring"]))
def test_background_is_empty(index, task):
    sample, new = made(task, index, "background")
    assert [text_of(turn) for turn in new.turns] == ["What is in [region]?", "none"]
    (box,) = next(part for part in new.turns[0].parts if isinstance(part, Boxes)).boxes
    assert 0 <= box[0] < box[2] <= 128 and 0 <= box[1] < box[3] <= 128
    for thing in objects_of(sample):
        assert iou(box, thing.box) < 0.1
        across = max(0, min(box[2], thing.box[2]) - max(box[0], thing.box[0]))
        down = max(0, min(box[3], thing.box[3]) - max(box[1], thing.box[1]))
        for area in ((b[2] - b[0]) * (b[3] - b[1]) for b in (thing.box, box)):
            assert across * down < 0.1 * area


def test_without_a_name_of_the_kind_the_nearest_spelling_is_hard():
    sample = RECIPE.sample("grounding", 1, "train")
    asked = text_of(sample.turns[0]).removeprefix("Find ").removesuffix(".")
    names = {asked: "thing", f"{asked}s": "other", "zzz": "other"}
    new = negative(sample, "hard", names, VERIFY, WHAT)
    assert text_of(new.turns[0]) == f"Find {asked}s."


@pytest.mark.parametrize("kind", ["hard", "random", "background", "confirmed"])
def test_what_else_was_right_for_the_sample_is_not_for_its_negatives(kind):
    sample = RECIPE.sample("referring", 1, "train")
    sample = replace(sample, meta=sample.meta | {"answers": ["a", "b"], "choices": ["a", "b"]})
    assert not {"answers", "choices"} & set(negative(sample, kind, NAMES, VERIFY, WHAT).meta)


def shares(wish: dict, form: str, progress: float = 0.0) -> dict[str, float]:
    source = Source(scenes="base", task="grounding", negatives=Negatives(**wish))
    return {kind: round(share(progress), 6) for kind, share in negative_shares(source, form).items()}


def test_one_to_three_for_detection_one_to_one_for_referring():
    detection = shares({}, "detection")
    assert detection == {"samples": 0.25, "hard": 0.375, "random": 0.375, "background": 0.0, "confirmed": 0.0}
    referring = shares({}, "referring")
    negatives = referring["hard"] + referring["random"] + referring["background"]
    assert negatives == pytest.approx(0.5, abs=1e-5) and sum(referring.values()) == pytest.approx(1.0, abs=1e-5)
    assert referring["confirmed"] == pytest.approx(referring["hard"] + referring["random"], abs=1e-5)


def test_ratio_and_parts_move_with_progress():
    wish = {"ratio": [[0, 1], [0.5, 3]], "hard": [[0, 0], [0.3, 1]]}
    assert [shares(wish, "detection", p)["hard"] for p in (0.0, 0.3, 0.5)] == [0.0, 0.25, 0.375]
    assert [shares(wish, "detection", p)["samples"] for p in (0.0, 0.3, 0.5)] == [0.5, 0.5, 0.25]


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(VlmtuneError, match="leave no room for the samples"):
        shares({"ratio": 3, "background": 0}, "referring")
    with pytest.raises(VlmtuneError, match="hard, random and background are all 0"):
        shares({"hard": 0, "random": [[0, 1], [0.5, 0]]}, "detection")
    with pytest.raises(ValueError, match="ratio is 0 all the time"):
        Negatives(ratio=0)
    with pytest.raises(ValueError, match="not exactly once"):
        Negatives(verify="Is it there?")
    with pytest.raises(ValueError, match="belong to scenes of grounding or referring"):
        Source(scenes="base", task="vqa", negatives=Negatives())


def test_each_kind_is_a_source_with_a_weight_and_a_task():
    wish = Data(train=[Source(scenes="base", task="referring", weight=2.0, negatives=Negatives(random=0))])
    members = build_train(wish)
    assert [member.source.tasks() for member in members] == [
        [f"referring{suffix}"] for suffix in ("", "_hard", "_background", "_confirmed")
    ]
    assert [round(member.weight(0.0), 6) for member in members] == [0.5, 0.5, 0.5, 0.5]
    assert members[1].source[3].task == "referring_hard"


OBJECTS = [{"name": "red mug", "box": [4, 4, 20, 20]}, {"name": "dog", "box": [30, 20, 60, 44], "kind": "animal"}]


def write(folder: Path, *rows: dict) -> FileSource:
    (folder / "a.png").write_bytes(png(0))
    path = folder / "rows.jsonl"
    lines = [
        {"image": "a.png", "question": "Where is the red mug, please?", "boxes": [[4, 4, 20, 20]]} | r for r in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return FileSource(path, task="grounding")


def test_rows_of_files_keep_their_words_and_the_last_word_is_the_kind(tmp_path):
    other = [{"name": "blue mug", "box": [0, 0, 9, 9]}, {"name": "cat", "box": [20, 0, 30, 9], "kind": "animal"}]
    source = write(tmp_path, {"meta": {"objects": OBJECTS}}, {"meta": {"objects": [*OBJECTS, *other]}})
    names = source.names()
    assert names == {"red mug": "mug", "dog": "animal", "blue mug": "mug", "cat": "animal"}
    new = negative(source[0], "hard", names, VERIFY, WHAT)
    assert [text_of(turn) for turn in new.turns] == ["Where is the blue mug, please?", "none"]
    background = negative(source[0], "background", names, VERIFY, WHAT)
    assert isinstance(background.turns[0].parts[0], ImageRef) and background.turns[1].parts == (Text("none"),)


@pytest.mark.parametrize(
    ("row", "kind", "complaint"),
    [
        ({}, "hard", r"rows.jsonl:1 .*negatives need 'objects' in 'meta'"),
        ({"meta": {"objects": [{"name": "mug"}]}}, "hard", "in meta.objects is not"),
        ({"meta": {"objects": [{"name": "mug", "box": [9, 0, 3, 4]}]}}, "hard", "with x1 <= x2"),
        ({"meta": {"objects": OBJECTS[1:]}}, "hard", r"holds neither meta.name nor a name of meta.objects \(dog\)"),
        ({"meta": {"objects": OBJECTS}}, "random", "every name of the source is in this image"),
        ({"meta": {"objects": [{"name": "red mug", "box": [0, 0, 64, 48]}]}}, "background", "found no background of"),
        ({"boxes": [], "answer": "there", "meta": {"objects": OBJECTS}}, "hard", "this one has neither"),
    ],
)
def test_rows_without_a_negative_say_why(tmp_path, row, kind, complaint):
    source = write(tmp_path, row)
    with pytest.raises(VlmtuneError, match=complaint):
        negative(source[0], kind, source.names(), VERIFY, WHAT)


def test_a_row_may_say_what_it_asks_for(tmp_path):
    """The name of something that is in no image of the source."""
    row = {
        "question": "Any unicorn here?",
        "answer": "none",
        "boxes": [],
        "meta": {"objects": OBJECTS, "name": "unicorn"},
    }
    source = write(tmp_path, row, {"meta": {"objects": [{"name": "cat", "box": [0, 0, 9, 9]}]}})
    new = negative(source[0], "random", source.names(), VERIFY, WHAT)
    assert [text_of(turn) for turn in new.turns] == ["Any cat here?", "none"]


def test_a_source_has_questions_of_one_form(tmp_path):
    source = write(tmp_path, {"meta": {"objects": OBJECTS}})
    with pytest.raises(VlmtuneError, match="a question of detection in a source whose first row is one of referring"):
        NegativeSource(source, "hard", "referring", VERIFY, WHAT)[0]


def test_a_region_of_nothing_is_refused():
    sample = RECIPE.sample("referring", 0, "train")
    meta = sample.meta | {"objects": [{"name": "dog", "box": [0, 0, 1, 1]}]}
    with pytest.raises(VlmtuneError, match="is none of meta.objects"):
        negative(replace(sample, meta=meta), "hard", NAMES, VERIFY, WHAT)

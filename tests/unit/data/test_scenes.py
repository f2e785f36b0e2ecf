"""The embedded scenes: the same everywhere, no leakage between splits, every answer re-derived from what was placed."""

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.data.atlas import FONTS, PHOTOS, atlas, colour_name, concept_names, dominant_colour, photo
from vlmtune.data.corpus import text_corpus
from vlmtune.data.export_scenes import write_split
from vlmtune.data.layout import RESERVED_STRIP, SIZE, held_out
from vlmtune.data.questions import VQA_FORMS
from vlmtune.data.scenes import CHAT_TASKS, TASKS, SceneRecipe, draw_background, draw_objects
from vlmtune.types import Boxes, ImageRef, Text, VlmtuneError

GROUPS = ("base", "new", "all")
SPLITS = ("train", "val")
PER_TASK = 80
QUESTIONS = 2500  # per split, for what needs no picture

RECIPE = SceneRecipe("base")
CORPUS_DIGEST = "a02e2d9e5051a291"
LABEL_DIGEST = "46a77e0d1e87df06"


def prompt_text(turn_parts) -> str:
    return "".join(part.text for part in turn_parts if isinstance(part, Text))


def asked(sample) -> str:
    return prompt_text(sample.turns[0].parts)


def labels_digest() -> str:
    """Of questions, answers and boxes. Pictures are left out, and so are the boxes of strings: both depend on the
    versions of Pillow and FreeType."""
    digest = hashlib.sha256()
    for group in GROUPS:
        for split in SPLITS:
            for task in TASKS:
                for index in range(20):
                    question = SceneRecipe(group).question(task, index, split)
                    boxes = () if task == "ocr" else question.boxes
                    digest.update(repr((question.form, prompt_text(question.prompt), question.answer, boxes)).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def samples():
    return {split: [RECIPE.sample(task, i, split) for task in TASKS for i in range(PER_TASK)] for split in SPLITS}


@pytest.fixture(scope="module")
def scenes():
    """(scene, question) of VQA samples before they are drawn: by split, for the base and the new concepts together."""
    found = {split: [] for split in SPLITS}
    for split in SPLITS:
        for group in ("base", "new"):
            recipe = SceneRecipe(group)
            for index in range(QUESTIONS // 2):
                _, random = recipe._seed("vqa", index, split)
                found[split].append(recipe._ask("vqa", random, split))
    return found


# The same sample everywhere.


def test_a_sample_is_the_same_alone_and_in_reverse_order(samples):
    for split in SPLITS:
        again = [RECIPE.sample(task, i, split) for task in reversed(TASKS) for i in reversed(range(PER_TASK))]
        assert list(reversed(again)) == samples[split]


def test_a_fresh_process_with_another_hash_seed_makes_the_same_labels_and_pictures():
    code = (
        "import hashlib\nfrom vlmtune.data.scenes import *\n"
        "s = [SceneRecipe('new').sample(t, 7, 'val') for t in TASKS]\n"
        "print(hashlib.sha256(repr(s).encode()).hexdigest())"
    )
    here = [SceneRecipe("new").sample(task, 7, "val") for task in TASKS]
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


def test_labels_did_not_change():
    """Recorded results rest on these samples; a new digest means that they must be recorded again."""
    assert labels_digest() == LABEL_DIGEST


def without_masks(parts) -> tuple:
    return tuple(replace(part, masks=()) if isinstance(part, Boxes) else part for part in parts)


def test_question_without_drawing_is_the_question_of_the_sample(samples):
    for sample in samples["val"]:
        _, _, task, index = sample.id.split("/")
        question = RECIPE.question(task, int(index), "val")
        assert question.prompt == without_masks(sample.turns[0].parts[1:])
        assert (question.reply,) == without_masks(sample.turns[1].parts)


# No leakage.


def test_splits_share_no_picture(samples):
    pictures = {s: {hashlib.sha256(x.images[0].source).digest() for x in samples[s]} for s in SPLITS}
    assert not pictures["train"] & pictures["val"]
    assert len(pictures["train"]) == len(samples["train"])


def test_photos_are_disjoint_but_for_which_photo(samples):
    for split in SPLITS:
        seen = {x.meta["background"] for x in samples[split] if x.meta["question"] != "which_photo"}
        assert seen == set(PHOTOS[split])
    assert {x.meta["background"] for x in samples["val"] if x.meta["question"] == "which_photo"} <= set(PHOTOS["train"])


def test_which_photo_is_validated_on_a_strip_no_training_scene_shows(scenes):
    shown = {name: np.zeros(photo(name).size[::-1], bool) for name in PHOTOS["train"]}
    crops = [scene.background for scene, _ in scenes["train"]]
    for index in range(500):  # the task "ocr" chooses its background by itself
        _, random = RECIPE._seed("ocr", index, "train")
        crops.append(RECIPE._write(random, "train")[1])
    for background in crops:
        x1, y1, x2, y2 = background.crop
        assert 0 <= x1 < x2 <= photo(background.photo).width and 0 <= y1 < y2 <= photo(background.photo).height
        shown[background.photo][y1:y2, x1:x2] = True
    validated = [scene.background for scene, question in scenes["val"] if question.form == "which_photo"]
    assert len(validated) > 300
    for background in validated:
        x1, y1, x2, y2 = background.crop
        assert not shown[background.photo][y1:y2, x1:x2].any()
        assert x2 - x1 == y2 - y1 and x2 <= photo(background.photo).width
    for name, area in shown.items():
        assert area[:, :-RESERVED_STRIP].mean() > 0.97, f"training shows hardly any of {name}"


def pairs(scene) -> set[tuple[str, str]]:
    return set(combinations(sorted({thing.name for thing in scene.objects}), 2))


def test_validation_scenes_have_pairs_of_concepts_that_training_never_shows(scenes):
    trained = set().union(*(pairs(scene) for scene, _ in scenes["train"]))
    assert not any(held_out(*pair) for pair in trained)
    several = [pairs(scene) for scene, _ in scenes["val"] if pairs(scene)]
    assert len(several) > 1000
    assert all(scene_pairs - trained for scene_pairs in several)
    assert all(any(held_out(*pair) for pair in scene_pairs) for scene_pairs in several)


@pytest.mark.parametrize("group", GROUPS)
def test_written_strings_are_disjoint(group):
    strings = {s: {SceneRecipe(group).question("ocr", i, s).answer for i in range(1500)} for s in SPLITS}
    assert not strings["train"] & strings["val"]
    assert len(strings["val"]) > 300 and all(len(text) <= 8 for s in SPLITS for text in strings[s])


def test_one_font_is_for_validation_only():
    fonts = {}
    for split in SPLITS:
        fonts[split] = Counter(RECIPE._write(RECIPE._seed("ocr", i, split)[1], split)[0].font for i in range(400))
    assert set(fonts["train"]) == set(FONTS["train"])
    assert 0.4 < fonts["val"][FONTS["val"][0]] / 400 < 0.6


# Concepts.


def test_base_and_new_concepts_are_disjoint_and_balanced_over_kinds():
    base, new, both = map(concept_names, GROUPS)
    assert (len(base), len(new), len(both)) == (72, 24, 96)
    assert not set(base) & set(new) and set(base) | set(new) == set(both)
    for names, allowed in ((base, {5, 6}), (new, {1, 2}), (both, {7, 8})):
        per_kind = Counter(atlas()[name].kind for name in names)
        assert len(per_kind) == 13 and set(per_kind.values()) == allowed


@pytest.mark.parametrize("group", GROUPS)
def test_every_concept_is_trained(group):
    recipe = SceneRecipe(group)
    seen = set()
    for index in range(1000):
        seen |= set(
            re.split(r" (?:top|bottom) (?:left|right)(?:; )?", recipe.question("caption", index, "train").answer)
        )
    assert seen - {""} == set(concept_names(group))


# Every answer, from the objects in `meta`.


def centre(thing, axis):
    return (thing["box"][axis] + thing["box"][axis + 2]) / 2


def check_vqa(sample):
    question, answer, objects = asked(sample), sample.meta["answer"], sample.meta["objects"]
    named = {thing["name"]: thing for thing in objects}
    names = [thing["name"] for thing in objects]
    at = {thing["where"]: thing for thing in objects}
    if match := re.fullmatch(r"What kind is (.+)\?", question):
        assert answer == at[match[1]]["kind"] == atlas()[at[match[1]]["name"]].kind
    elif match := re.fullmatch(r"What is ((?:top|bottom) (?:left|right))\?", question):
        assert answer == at[match[1]]["name"]
    elif match := re.fullmatch(r"What is (left of|above) (.+)\?", question):
        axis = ("left of", "above").index(match[1])
        assert names.count(match[2]) == 1
        before = [thing for thing in objects if centre(thing, axis) < centre(named[match[2]], axis)]
        assert [thing["name"] for thing in before] == [answer]
        assert centre(named[match[2]], axis) - centre(before[0], axis) >= 20
    elif match := re.fullmatch(r"Any (.+)\?", question):
        assert answer == ("yes" if match[1] in names else "no")
    elif match := re.fullmatch(r"How many (.+)\?", question):
        assert answer == str(names.count(match[1])) != "0"
    elif match := re.fullmatch(r"Larger: (.+) or (.+)\?", question):
        areas = {}
        for name in match.groups():
            assert names.count(name) == 1
            x1, y1, x2, y2 = named[name]["box"]
            areas[name] = (x2 - x1) * (y2 - y1)
        assert answer == max(areas, key=areas.get) and max(areas.values()) >= 1.25 * min(areas.values())
    elif match := re.fullmatch(r"What colour is (.+)\?", question):
        assert match[1] in names and answer == dominant_colour(match[1])
    elif match := re.fullmatch(r"Is (.+) (left of|above) (.+)\?", question):
        axis = ("left of", "above").index(match[2])
        assert names.count(match[1]) == names.count(match[3]) == 1
        apart = centre(named[match[3]], axis) - centre(named[match[1]], axis)
        assert answer == ("yes" if apart > 0 else "no") and abs(apart) >= 20
    else:
        assert question == "Which photo?" and answer == sample.meta["background"].replace("_", " ")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("split", SPLITS)
def test_vqa_answers(group, split):
    recipe = SceneRecipe(group)
    found = [recipe.sample("vqa", index, split) for index in range(200)]
    for sample in found:
        check_vqa(sample)
    forms = Counter(sample.meta["question"] for sample in found)
    assert len(forms) == 11, f"not every form was drawn: {forms}"


def test_caption_grounding_and_referring_answers(samples):
    checked = Counter()
    for sample in samples["train"] + samples["val"]:
        objects, (reply, *_) = sample.meta["objects"], without_masks(sample.turns[1].parts)
        if sample.task == "caption":
            assert sample.meta["answer"] == "; ".join(f"{thing['name']} {thing['where']}" for thing in objects)
        elif sample.task == "grounding":
            name = re.fullmatch(r"Find (.+)\.", asked(sample))[1]
            boxes = sorted((t["box"] for t in objects if t["name"] == name), key=lambda b: (b[1] >= 64, b[0] >= 64))
            assert sample.meta["boxes"] == boxes
            assert reply == (Boxes(tuple(map(tuple, boxes))) if boxes else Text("none"))
        elif sample.task == "referring":
            region = sample.turns[0].parts[2]
            assert region.region and [list(region.boxes[0])] == sample.meta["boxes"]
            assert [t["name"] for t in objects if t["box"] == list(region.boxes[0])] == [sample.meta["answer"]]
        checked[sample.task] += 1
    assert min(checked.values()) == 2 * PER_TASK


def test_places_are_where_the_boxes_are(samples):
    for sample in samples["train"] + samples["val"]:
        places = [thing["where"] for thing in sample.meta["objects"]]
        assert len(set(places)) == len(places)
        for thing in sample.meta["objects"]:
            x1, y1, x2, y2 = thing["box"]
            rows, columns = ("top", 0) if y2 <= 64 else ("bottom", 64), ("left", 0) if x2 <= 64 else ("right", 64)
            assert thing["where"] == f"{rows[0]} {columns[0]}"
            assert rows[1] <= y1 < y2 <= rows[1] + 64 and columns[1] <= x1 < x2 <= columns[1] + 64


def test_a_box_is_the_bounding_box_of_the_opaque_pixels(scenes):
    """Alpha measured without looking at any: an object drawn on black and on white differs where it is transparent."""
    measured = 0
    for scene, _ in scenes["train"][:150]:
        for thing in scene.objects:
            black = draw_objects(Image.new("RGB", (SIZE, SIZE), "black"), (thing,))
            white = draw_objects(Image.new("RGB", (SIZE, SIZE), "white"), (thing,))
            alpha = 255 - (np.asarray(white, int) - np.asarray(black, int)).max(axis=2)
            rows, columns = np.nonzero(alpha > 96)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            measured += 1
    assert measured > 200


def test_referring_mask_fills_the_box():
    for index in range(40):
        mask, sample = RECIPE.mask(index, "val"), RECIPE.sample("referring", index, "val")
        assert (mask.mode, mask.size) == ("1", (SIZE, SIZE))
        assert list(mask.getbbox()) == sample.meta["boxes"][0]


def test_the_box_of_a_string_holds_all_ink():
    for index in range(60):
        sample = RECIPE.sample("ocr", index, "val")
        writing, background = RECIPE._write(RECIPE._seed("ocr", index, "val")[1], "val")
        drawn = np.asarray(Image.open(io.BytesIO(sample.images[0].source)), int)
        changed = np.abs(drawn - np.asarray(draw_background(background), int)).max(axis=2) > 24
        rows, columns = np.nonzero(changed)
        ((x1, y1, x2, y2),) = sample.meta["boxes"]
        assert 0 <= x1 <= columns.min() <= columns.max() < x2 <= SIZE
        assert 0 <= y1 <= rows.min() <= rows.max() < y2 <= SIZE
        assert writing.text == sample.meta["answer"]


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((140, 140, 140), "grey"), ((220, 20, 20), "red"),
        ((250, 150, 20), "orange"), ((250, 220, 30), "yellow"), ((40, 160, 60), "green"), ((30, 110, 220), "blue"),
        ((140, 50, 190), "purple"), ((250, 150, 190), "pink"), ((120, 70, 30), "brown"), ((200, 225, 240), None),
    ],
)  # fmt: skip
def test_colour_names(rgb, name):
    assert colour_name(*rgb) == name


def test_colours_of_things_everyone_knows():
    known = {
        "lemon": "yellow",
        "cactus": "green",
        "teddy bear": "brown",
        "toolbox": "red",
        "bucket": "blue",
        "fox": "orange",
    }
    assert {name: dominant_colour(name) for name in known} == known
    assert dominant_colour("crystal ball") is None
    assert sum(dominant_colour(name) is not None for name in concept_names("base")) >= 15


# Balance.


def test_yes_and_no_are_balanced_and_levels_equally_likely(scenes):
    for split in SPLITS:
        answers, levels = {}, Counter()
        for _, question in scenes[split]:
            answers.setdefault(question.form, Counter())[question.answer] += 1
            levels[question.level] += 1
        for form in ("exists", "left_of", "above"):
            yes, no = answers[form]["yes"], answers[form]["no"]
            assert yes + no == answers[form].total() > 100
            assert abs(yes - no) < 4 * (yes + no) ** 0.5, (split, form, yes, no)  # four standard deviations
        assert set(levels) == set(VQA_FORMS)
        assert max(levels.values()) < 1.2 * min(levels.values())
        assert (
            set(answers["count"]) == {"1", "2", "3"}
            and max(answers["count"].values()) < 0.45 * answers["count"].total()
        )


def test_half_of_the_things_that_are_not_there_are_of_a_kind_that_is():
    absent = [
        RECIPE.sample("vqa", i, "train") for i in range(1200) if RECIPE.question("vqa", i, "train").answer == "no"
    ]
    absent = [sample for sample in absent if sample.meta["question"] == "exists"]
    hard = [x for x in absent if atlas()[asked(x)[4:-1]].kind in {thing["kind"] for thing in x.meta["objects"]}]
    assert len(absent) > 50 and 0.4 < len(hard) / len(absent) < 0.8  # an easy one may be of that kind by chance


def test_one_in_eight_things_to_find_is_absent():
    found = Counter(RECIPE.question("grounding", i, "train").form for i in range(2000))
    assert abs(found["find_absent"] / 2000 - 1 / 8) < 0.03


def test_a_question_has_at_most_three_words_of_its_own():
    for recipe in map(SceneRecipe, GROUPS):
        given = sorted(
            [*recipe.names, "top left", "top right", "bottom left", "bottom right", "left of", "above"], key=len
        )
        for task in TASKS:
            for index in range(150):
                text = prompt_text(recipe.question(task, index, "val").prompt)
                for name in reversed(given):
                    text = re.sub(rf"\b{name}\b", "", text)
                assert len(re.findall(r"\w+", text)) <= 3, text


# Form of a sample, files, text.


def test_form_of_a_sample(samples):
    sample = samples["train"][0]
    assert sample.id == "base/train/caption/0" and sample.task == "caption"
    for sample in samples["train"] + samples["val"]:
        user, assistant = sample.turns
        assert (user.role, assistant.role) == ("user", "assistant")
        assert isinstance(user.parts[0], ImageRef) and len(sample.images) == 1 and len(assistant.parts) == 1
        picture = Image.open(io.BytesIO(user.parts[0].source))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (SIZE, SIZE))
        assert json.loads(json.dumps(sample.meta)) == sample.meta
        fields = {"answer", "boxes", "level", "question", "objects", "background"}
        assert set(sample.meta) == fields | ({"name"} if sample.task == "grounding" else set())
        if sample.task == "grounding":
            assert asked(sample) == f"Find {sample.meta['name']}."
        assert sample.meta["level"] in VQA_FORMS


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: SceneRecipe("old"), "base, new or all"),
        (lambda: RECIPE.sample("counting", 0, "train"), "unknown task 'counting'"),
        (lambda: RECIPE.sample("vqa", 0, "test"), "train or val"),
        (lambda: RECIPE.sample("vqa", -1, "train"), "negative"),
        (lambda: RECIPE.sample("ocr", 0, "train", turns=2), "several turns"),
        (lambda: RECIPE.sample("vqa", 0, "val", turns=2), "several turns"),
    ],
)
def test_wrong_arguments_are_refused(call, complaint):
    with pytest.raises(VlmtuneError, match=complaint):
        call()


@pytest.mark.parametrize("task", CHAT_TASKS)
def test_several_turns_ask_different_questions_about_one_scene(task):
    for index in range(60):
        one, many = (RECIPE.sample(task, index, "train", turns) for turns in (1, 4))
        assert many.turns[: len(one.turns)] == one.turns and (many.id, many.meta) == (one.id, one.meta)
        assert many == RECIPE.sample(task, index, "train", 4)
        questions = [turn.parts for turn in many.turns[2::2]]
        assert len(questions) <= 3 and len({repr(parts) for parts in questions}) == len(questions)
        assert one.turns[0].parts[1:] not in questions
        assert not any(isinstance(part, ImageRef) for parts in questions for part in parts)
        objects = {thing["name"]: thing["box"] for thing in many.meta["objects"]}
        for question, answer in zip(many.turns[2::2], many.turns[3::2], strict=True):
            if task == "referring":
                assert list(question.parts[1].boxes[0]) in [thing["box"] for thing in many.meta["objects"]]
            if task == "grounding":
                name = question.parts[0].text.removeprefix("Find ").removesuffix(".")
                assert name in objects and isinstance(answer.parts[0], Boxes)
    lengths = [len(RECIPE.sample(task, index, "train", 4).turns) for index in range(60)]
    assert 4 < sum(lengths) / len(lengths) <= 8


def test_written_split_reads_back(tmp_path):
    path = write_split(RECIPE, TASKS, "val", 12, tmp_path / "scenes", start=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"base/val/{task}/{i}" for task in TASKS for i in range(5, 17)]
    for row in rows:
        sample = RECIPE.sample(row["task"], int(row["id"].rsplit("/", 1)[1]), "val")
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert (path.parent / user["content"][0]["image"]).read_bytes() == sample.images[0].source
        assert Image.open(path.parent / user["content"][0]["image"]).convert("RGB").size == (SIZE, SIZE)
        read = []
        for part in user["content"][1:] + assistant["content"]:
            if part["type"] == "text":
                read.append(Text(part["text"]))
            else:
                masks = tuple((path.parent / name).read_bytes() for name in part["masks"])
                read.append(Boxes(tuple(map(tuple, part["boxes"])), part.get("region", False), masks=masks))
        assert tuple(read) == sample.turns[0].parts[1:] + sample.turns[1].parts
        assert row["meta"] == sample.meta
    assert len(list((path.parent / "images").iterdir())) == len(rows)
    again = write_split(RECIPE, TASKS, "val", 12, tmp_path / "again", start=5)
    assert again.read_bytes() == path.read_bytes()


def test_a_split_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail_late(task, index, split, turns):
        if index == 2:
            raise KeyboardInterrupt
        return SceneRecipe.sample(RECIPE, task, index, split, turns)

    broken = SceneRecipe("base")
    monkeypatch.setattr(broken, "sample", fail_late)
    with pytest.raises(KeyboardInterrupt):
        write_split(broken, ("vqa",), "train", 5, tmp_path / "scenes")
    assert list(tmp_path.iterdir()) == []
    write_split(RECIPE, ("vqa",), "train", 1, tmp_path / "scenes")
    with pytest.raises(VlmtuneError, match="exists already"):
        write_split(RECIPE, ("vqa",), "train", 1, tmp_path / "scenes")


def test_text_corpus_names_everything_and_never_changes():
    lines = list(text_corpus())
    assert lines == list(text_corpus())
    assert set(atlas()) <= set(lines) and len(atlas()) == 466
    # the tokenizer in the package was trained on exactly this text; another text would give another tokenizer
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == CORPUS_DIGEST

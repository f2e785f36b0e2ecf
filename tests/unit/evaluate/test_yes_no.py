"""POPE: what replies say, its scores against published ones, and questions whose answers are known."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from vlmtune.data.scenes import SceneRecipe
from vlmtune.evaluate.yes_no import (
    CATEGORIES,
    IMAGES,
    YesNoScores,
    categories_of,
    poll,
    require_yes_no,
    said,
    truth_of,
    yes_no_scores,
)
from vlmtune.types import ImageRef, Sample, Text, Turn, VlmtuneError


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes, there is a dog. It is not small.", "yes"),
        ("yes", "yes"),
        ("No.", "no"),
        ("There is not a dog in the image.", "no"),
        ("There isn\u2019t any. Yes?", "no"),
        ("Yes, but no dog", "no"),  # a negation decides, as in POPE's script
        ("a dog", None),
        ("nothing known about eyes", None),  # words, not letters
        ("", None),
    ],
)
def test_what_a_reply_says(reply, expected):
    assert said(reply) == expected


def test_scores_are_the_published_ones():
    """LLaVA on MSCOCO, random (Li et al. 2023): 3,000 questions, half of them yes. Its recall of 99.80 and yes rate of
    95.37 make 1,497 and 1,364 affirmations; accuracy 54.43, precision 52.32 and F1 68.65 follow."""
    scores = YesNoScores(true_yes=1497, false_yes=1364, true_no=136, false_no=3, unclear_yes=0, unclear_no=0)
    assert scores.count == 3000 and scores.asked_yes == 1500
    published = {"accuracy": 54.43, "precision": 52.32, "recall": 99.80, "f1": 68.65, "yes_rate": 95.37}
    for name, percent in published.items():
        assert 100 * getattr(scores, name) == pytest.approx(percent, abs=0.006), name


def test_scores_by_hand():
    replies = ["yes", "Yes.", "no", "no", "maybe", "a cat", "yes"]
    truths = ["yes", "no", "no", "yes", "yes", "no", "yes"]
    scores = yes_no_scores(replies, truths)
    assert scores == YesNoScores(true_yes=2, false_yes=1, true_no=1, false_no=1, unclear_yes=1, unclear_no=1)
    assert scores.accuracy == pytest.approx(3 / 7) and scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 4) and scores.yes_rate == pytest.approx(3 / 7)
    assert scores.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    record = scores.record()
    assert record["unclear"] == 2 and record["intervals"]["precision"][0] < 2 / 3 < record["intervals"]["precision"][1]


def test_scores_of_one_sided_truths_divide_by_nothing():
    assert yes_no_scores(["no", "no"], ["no", "no"]).record()["f1"] == 0.0
    with pytest.raises(ValueError, match="a truth for each reply"):
        yes_no_scores([], [])


def scene_samples(count: int) -> list[Sample]:
    recipe = SceneRecipe("base")
    return [recipe.sample("caption", index, "val") for index in range(count)]


def test_polls_of_scenes_are_true_and_balanced():
    samples = scene_samples(12)
    there = {sample.id: {thing["name"] for thing in sample.meta["objects"]} for sample in samples}
    asked = poll(samples, "Any {name}?")
    assert asked == poll(samples, "Any {name}?"), "the same questions in any process"
    for question in asked:
        owner = question.id.split("/pope/")[0]
        assert (question.meta["name"] in there[owner]) == (truth_of(question) == "yes")
        assert question.images == next(sample for sample in samples if sample.id == owner).images
        assert question.turns[0].parts[-1] == Text(f"Any {question.meta['name']}?")
    for category in CATEGORIES:
        truths = [truth_of(question) for question in asked if category in categories_of(question)]
        assert truths.count("yes") == truths.count("no") > 10


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def with_objects(number: int, *names: str) -> Sample:
    objects = [{"name": name, "box": [0, 0, 4, 4]} for name in names]
    turns = (Turn("user", (ImageRef(picture()), Text("?"))), Turn("assistant", (Text("x"),)))
    return Sample(f"s{number}", turns, origin=f"t.jsonl:{number}", meta={"objects": objects})


def test_popular_and_adversarial_names():
    """dog is in 4 images; fork only ever beside knife. Of an image of a knife, popular is dog, adversarial is fork."""
    samples = [with_objects(0, "knife"), with_objects(1, "knife", "fork"), with_objects(2, "knife", "fork")]
    samples += [with_objects(n, "dog") for n in range(3, 7)] + [with_objects(7, "cup")]
    asked = [question for question in poll(samples) if question.id.startswith("s0/")]
    by_category = {
        category: [question.meta["name"] for question in asked if category in question.meta["pope"]]
        for category in CATEGORIES
    }
    assert by_category["popular"] == ["knife", "dog"]
    assert by_category["adversarial"] == ["knife", "fork"]
    assert by_category["random"][0] == "knife" and by_category["random"][1] in ("fork", "dog", "cup")
    assert asked[0].turns[0].parts[-1] == Text("Is there a knife in the image?")


def test_the_article_and_the_number_of_images():
    asked = poll([with_objects(n, "apple" if n % 2 else "bus") for n in range(IMAGES + 20)])
    assert len({question.id.split("/")[0] for question in asked}) == IMAGES
    assert Text("Is there an apple in the image?") in [question.turns[0].parts[-1] for question in asked]


def test_nothing_is_asked_where_nothing_is_known():
    bare = Sample("a", (Turn("user", (ImageRef(picture()),)), Turn("assistant", (Text("x"),))))
    everything = with_objects(1, "dog")
    assert poll([bare]) == [] and poll([everything]) == []
    with pytest.raises(VlmtuneError, match="does not hold {name} once"):
        poll([everything], "Is it there?")
    broken = with_objects(2, "dog")
    broken.meta["objects"].append({"name": "", "box": [1, 2]})
    with pytest.raises(VlmtuneError, match="t.jsonl:2"):
        poll([broken])


def test_rows_of_a_probe_file():
    def row(reply: str, **meta) -> Sample:
        return Sample("r1", (Turn("user", (Text("?"),)), Turn("assistant", (Text(reply),))), "pope", "p.jsonl:1", meta)

    (checked,) = require_yes_no([row("Yes.", pope="adversarial")])
    assert categories_of(checked) == ["adversarial"] and truth_of(checked) == "yes"
    assert categories_of(row("no")) == ["pope"]
    with pytest.raises(VlmtuneError, match=r"p.jsonl:1 \(sample r1\): the reply of a yes/no probe"):
        require_yes_no([row("yes, a dog")])
    with pytest.raises(VlmtuneError, match="meta.pope is a category"):
        require_yes_no([row("no", pope=3)])

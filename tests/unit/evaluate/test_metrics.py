"""Which metrics a task has, what they are given, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.data.grounding import coordinates
from vlmtune.evaluate.metrics import require_readouts, require_scorable, score_sample, score_task
from vlmtune.evaluate.names import CORPUS_METRICS, METRICS, TEXT_METRICS, require_metric, task_metrics
from vlmtune.types import Boxes, ImageGeometry, Points, Sample, Text, Turn, VlmtuneError


def sample(*parts, task="default"):
    turns = (Turn("user", (Text("Question?"),)), Turn("assistant", tuple(parts)))
    return Sample(id="s", turns=turns, task=task, origin="val.jsonl:3")


BOX = (0.0, 0.0, 10.0, 10.0)


def score(task: str, predictions: list[str], samples: list[Sample], boxes: list) -> dict[str, float]:
    return score_task(task, predictions, samples, boxes, coordinates("norm1000").without_places)


@pytest.mark.parametrize(
    "task, reference, prediction, expected",
    [
        ("caption", "a left; b right", "a left; c right", {"f1": 0.5, "exact_match": 0.0}),
        ("vqa", "red", " red ", {"exact_match": 1.0}),
        ("ocr", "12:45", "12:46", {"anls": 0.8, "exact_match": 0.0}),
        ("referring", "violin", "violin", {"accuracy": 1.0}),
        ("my own task", "yes", "no", {"exact_match": 0.0}),
    ],
)
def test_score_task_of_text(task, reference, prediction, expected):
    scores = score(task, [prediction], [sample(Text(reference))], [[]])
    assert scores == pytest.approx(expected)
    assert tuple(scores) == task_metrics(task)


def test_score_task_of_grounding():
    samples = [sample(Boxes((BOX,))), sample(Text("none")), sample(Text("none"))]
    scores = score("grounding", ["<box>...</box>", "none", "<box>...</box>"], samples, [[BOX], [], [BOX]])
    assert scores == pytest.approx({"mean_iou": 2 / 3, "acc_50": 2 / 3})


def test_an_unknown_task_gets_box_metrics_where_the_reply_has_boxes():
    samples = [sample(Text("the cat "), Boxes((BOX,)), Text(" sleeps")), sample(Text("no idea"))]
    predictions = ["the cat <box>[[1,2,3,4]]</box> sleeps", "no idea"]
    scores = score("chat", predictions, samples, [[(0, 0, 10, 5)], []])
    assert scores == {"exact_match": 1.0, "mean_iou": 0.5, "acc_50": 1.0}


@pytest.mark.parametrize("name", ["norm1000", "markup", "paligemma", "kosmos2"])
def test_the_text_beside_places_is_compared_in_every_convention(name):
    convention, geometry = coordinates(name), ImageGeometry(20, 20, 40, 40)
    box, click = convention.render([BOX], geometry), convention.render_points([(1, 2)], geometry, click=True)
    samples = [sample(Text("the cat "), Boxes((BOX,))), sample(Text("press "), Points(((1, 2),), click=True))]
    for predictions, expected in (([f"the cat {box}", f"press {click}"], 1.0), ([f"a cat {box}", "pull"], 0.0)):
        scores = score_task("chat", predictions, samples, [[BOX], []], convention.without_places)
        assert scores["exact_match"] == expected
    plain = [sample(Text("the cat"))]  # a reply that points where it should not is not forgiven
    assert score_task("chat", [f"the cat {box}"], plain, [[BOX]], convention.without_places) == {"exact_match": 0.0}


def test_regions_are_not_targets():
    turn = sample(Boxes((BOX,), region=True), Text("violin"))
    assert score("chat", ["violin"], [turn], [[]]) == {"exact_match": 1.0}


def test_the_last_assistant_turn_is_the_reference():
    turns = (Turn("assistant", (Text("old"),)), Turn("user", (Text("?"),)), Turn("assistant", (Text("new"),)))
    assert score("vqa", ["new"], [Sample("s", turns)], [[]]) == {"exact_match": 1.0}


def test_a_sample_without_reply_is_named():
    lonely = Sample("s", (Turn("user", (Text("?"),)),), origin="val.jsonl:9")
    with pytest.raises(VlmtuneError, match="val.jsonl:9"):
        score("vqa", ["x"], [lonely], [[]])


def test_absence_has_to_be_said():
    samples = [sample(Text("none"))] * 2
    assert score("grounding", ["none", "hook hook hook"], samples, [[], []]) == {"mean_iou": 0.5, "acc_50": 0.5}
    assert score("grounding", ["hook", ""], samples, [[], []]) == {"mean_iou": 0.0, "acc_50": 0.0}


# ---- chosen metrics and accepted answers --------------------------------------------------------------------------


def answered(*accepted: str, reply: str = "red", task: str = "vqa") -> Sample:
    turns = (Turn("user", (Text("?"),)), Turn("assistant", (Text(reply),)))
    return Sample("s7", turns, task, "val.jsonl:3", {"answers": list(accepted)} if accepted else {})


def choose(names, predictions: list[str], samples: list[Sample], boxes=None, task: str = "vqa") -> dict[str, float]:
    boxes = boxes or [[] for _ in samples]
    return score_task(task, predictions, samples, boxes, coordinates("norm1000").without_places, names)


def test_every_text_metric_can_be_chosen_and_is_perfect_on_the_reference():
    """CIDEr by its own scale, and of texts that share no words and have four."""
    samples = [answered(*["red big round circle"] * 10), answered(*["two small blue squares"] * 10)]
    perfect = choose(TEXT_METRICS, ["red big round circle", "two small blue squares"], samples)
    assert tuple(perfect) == TEXT_METRICS
    assert perfect == pytest.approx(dict.fromkeys(TEXT_METRICS, 1.0) | {"cider": 10.0})
    wrong = choose(TEXT_METRICS, ["xyz", "xyz"], samples)
    assert wrong == pytest.approx(dict.fromkeys(TEXT_METRICS, 0.0))


def test_accepted_answers_stand_for_the_reply():
    """Any of them is right, and the reply itself only if it is among them."""
    samples = [answered("scarlet", "dark red"), answered(reply="blue")]
    assert choose(["exact_match"], ["dark red", "blue"], samples) == {"exact_match": 1.0}
    assert choose(["exact_match"], ["red", "blue"], samples) == {"exact_match": 0.5}
    assert choose(None, ["dark red", "blue"], samples) == {"exact_match": 1.0}
    assert choose(["anls"], ["dark rod", "blue"], samples) == {"anls": pytest.approx((7 / 8 + 1) / 2)}
    assert choose(["f1"], ["dark red", "blue"], samples) == {"f1": 1.0}


def test_the_order_is_the_chosen_one_and_nothing_else_is_reported():
    assert list(choose(["rouge_l", "exact_match"], ["red"], [answered()])) == ["rouge_l", "exact_match"]
    assert choose(["mask_iou", "accuracy"], ["red"], [answered()]) == {"accuracy": 1.0}  # others read the heads


def test_box_metrics_can_be_chosen_for_any_task_with_boxes():
    samples = [sample(Text("the cat "), Boxes((BOX,))), sample(Text("no idea"))]
    scores = choose(["acc_50"], ["the cat", "no idea"], samples, [[(0, 0, 10, 5)], []], task="chat")
    assert scores == {"acc_50": 1.0}
    assert choose(["mean_iou"], ["", "no idea"], samples, [[], []], task="grounding") == {"mean_iou": 0.5}


@pytest.mark.parametrize(
    ("answers", "names"),
    [("red", ["exact_match"]), ([], ["exact_match"]), ([1, 2], ["bleu"]), ({"a": 1}, None), ([["red"]], ["anls"])],
)
def test_answers_that_are_no_texts_name_the_sample(answers, names):
    lone = Sample("s7", answered().turns, "vqa", "val.jsonl:3", {"answers": answers})
    with pytest.raises(VlmtuneError) as caught:
        choose(names, ["red"], [lone])
    assert str(caught.value).startswith("val.jsonl:3 (sample s7): meta.answers is a list of at least one text")


@pytest.mark.parametrize(("count", "said"), [(0, "there are none"), (3, "there are 3 of them")])
def test_vqa_accuracy_names_the_sample_without_ten_answers(count, said):
    samples = [answered(*["red"] * 10), answered(*["red"] * count)]
    with pytest.raises(VlmtuneError, match=rf"val.jsonl:3 \(sample s7\): vqa_accuracy needs meta.answers.* {said}"):
        choose(["vqa_accuracy"], ["red", "red"], samples)


def test_metrics_that_nothing_can_be_compared_with_are_refused():
    with pytest.raises(
        VlmtuneError, match="mean_iou and acc_50 of task 'vqa': no reply of its 1 held-out samples has a box"
    ):
        require_scorable("vqa", ["mean_iou", "acc_50"], [answered()])
    require_scorable("grounding", ["mean_iou"], [sample(Text("none"), task="grounding")])  # absence is an answer there
    with pytest.raises(VlmtuneError, match="only one held-out sample"):
        require_scorable("vqa", ["cider"], [answered()])
    with pytest.raises(VlmtuneError, match="mask_iou of task 'vqa' needs a mask head, but .*set loss.referring"):
        require_readouts("vqa", ["mask_iou"], [answered()], ["box"])
    with pytest.raises(VlmtuneError, match="head_iou of task 'vqa' needs a box head"):
        require_readouts("vqa", ["head_iou"], [answered()], [])
    boxed = [sample(Boxes((BOX,)))]
    require_readouts("vqa", ["head_iou", "bleu"], boxed, ["box"])
    with pytest.raises(VlmtuneError, match="mask_oiou of task 'vqa' needs boxes with masks, but none of its 1"):
        require_readouts("vqa", ["mask_oiou"], boxed, ["mask"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rougeL", "did you mean rouge_l?"),
        ("CIDEr", "did you mean cider?"),
        ("oIoU", "did you mean mask_oiou?"),
        ("acc@0.5", "did you mean acc_50?"),
        ("vqa_acuracy", "did you mean vqa_accuracy?"),
        ("qqq", "known: exact_match, accuracy, f1, "),
    ],
)
def test_an_unknown_metric_is_refused_with_the_nearest(name, said):
    with pytest.raises(VlmtuneError) as caught:
        require_metric(name)
    assert said in str(caught.value) and name in str(caught.value)


def test_every_metric_is_documented():
    """With its range, and what nothing scores."""
    page = (Path(__file__).parents[3] / "docs" / "guide" / "evaluate.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| `")]
    described = {cells[0].strip("`"): cells for cells in rows if len(cells) == 5}
    assert tuple(described) == METRICS
    assert all(all(cells) for cells in described.values())


@pytest.mark.parametrize(
    ("task", "chosen"),
    [
        ("caption", None), ("grounding", None), ("my own task", None), ("my own task", ["mean_iou", "rouge_l"]),
        ("vqa", ["anls", *CORPUS_METRICS]), ("vqa", ["cider"]), ("grounding", ["acc_50"]),
    ],
)  # fmt: skip
def test_a_task_is_the_mean_of_its_samples(task, chosen):
    """Of every metric that is a mean; boxes over the samples whose reference has some."""
    samples = [sample(Text("a cat left"), task=task), sample(Boxes((BOX,)), task=task), sample(Text("b"), task=task)]
    if task == "vqa":
        samples = [samples[0], samples[2]]
    replies = ["a dog left", "", "b"][: len(samples)]
    boxes = [[], [(0.0, 0.0, 5.0, 10.0)], [BOX]][: len(samples)]
    without = coordinates("norm1000").without_places
    whole = score_task(task, replies, samples, boxes, without, chosen)
    own = [score_sample(task, *one, without, chosen) for one in zip(replies, samples, boxes, strict=True)]
    means = {name: [scores[name] for scores in own if name in scores] for name in whole if name not in CORPUS_METRICS}
    assert {name: sum(v) / len(v) for name, v in means.items()} == pytest.approx({name: whole[name] for name in means})
    assert not {name for scores in own for name in scores} & set(CORPUS_METRICS)

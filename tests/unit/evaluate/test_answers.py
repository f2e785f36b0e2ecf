"""Answers and comparisons: sample by sample they add up to what `evaluate` reports (SPEC H3)."""

from __future__ import annotations

import pytest
import torch
from training_setup import write_boxes, write_data

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.sources import FileSource
from vlmtune.evaluate.answers import Scoring, answer
from vlmtune.evaluate.evaluation import evaluate
from vlmtune.evaluate.retention import LOSS, compare, pooled
from vlmtune.models.load import load_model, load_processor


@pytest.fixture(scope="module")
def asked(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    sources = [FileSource(write_data(folder / "words", 7)), FileSource(write_boxes(folder / "boxes", 3))]
    model = load_model(str(tiny_folder("llava"))).eval()
    encoder = Encoder(load_processor(str(tiny_folder("llava"))), coordinates("norm1000"))
    return model, encoder, sources


def answers_of(asked, **wishes):
    model, encoder, sources = asked
    groups = {"held": [source[n] for source in sources for n in range(source.size)]}
    return answer(model, encoder, groups, **{"batch_size": 3, "max_new_tokens": 9} | wishes)


def test_they_average_to_what_evaluate_reports(asked):
    model, encoder, sources = asked
    found = answers_of(asked)
    expected = evaluate(model, encoder, {"held": sources}, limit=None, batch_size=3, max_new_tokens=9)
    assert [one.reply for one in found] == [one.reply for one in expected.scored]
    compared = compare(found, found, Scoring(encoder.coordinates.without_places))
    for one in compared:
        if one.metric != LOSS:
            value = expected.metrics[f"{one.group}/{one.task}/{one.metric}"]
            assert one.change.after == pytest.approx(value) and one.change.difference == 0 and one.change.p == 1
    # losses: there every token counts the same, here every sample; of one sample they are the same mean
    one = evaluate(model, encoder, {"held": [sources[1]]}, limit=1, batch_size=1, max_new_tokens=None)
    assert found[7].loss == pytest.approx(one.metrics["loss"], rel=1e-5)
    assert {(one.task, one.metric) for one in compared if one.telling} == {
        ("caption", "f1"), ("vqa", "exact_match"), ("grounding", "mean_iou"),
    }  # fmt: skip


def test_the_order_of_batches_does_not_matter(asked):
    """Sums of another order: float32 rounding of losses, the same replies."""
    one, other = answers_of(asked, batch_size=1), answers_of(asked, batch_size=8)
    assert [a.reply for a in one] == [a.reply for a in other]
    assert [a.loss for a in one] == pytest.approx([a.loss for a in other], rel=1e-5)


def test_what_the_reference_is_and_whether_a_reply_ended(asked):
    model, encoder, _ = asked
    found = answers_of(asked)
    words = found[1]
    assert words.target == "one" or words.sample.turns[-1].parts[0].text == words.target
    assert words.target_tokens == encoder.text_length(words.target) + 1  # and the end of the turn
    assert all(one.tokens == 9 or (one.tokens < 9 and one.ended) for one in found)
    stops = encoder.stop_token_ids()
    never = answers_of(asked, max_new_tokens=1)
    assert all(one.tokens == 1 and (not one.ended or one.reply == "") for one in never)
    with torch.no_grad():  # a head that says nothing but the end of a reply
        head = model.get_output_embeddings()
        before = head.weight.clone()
        head.weight.zero_()
        bias = torch.zeros(len(before)).scatter(0, torch.tensor(sorted(stops)), 1.0)
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
        try:
            ended = answers_of(asked)
        finally:
            head.weight.copy_(before)
            head.bias = None
    assert all(one.ended and one.tokens == 1 and one.reply == "" for one in ended)


def test_pairs_are_of_the_same_samples(asked):
    _, encoder, _ = asked
    found = answers_of(asked)
    with pytest.raises(ValueError, match="same samples in the same order"):
        compare(found, found[::-1], Scoring(encoder.coordinates.without_places))
    without = answers_of(asked, with_reference=False)
    assert all(one.loss is None and one.target is None for one in without)
    assert LOSS not in {one.metric for one in compare(without, without, Scoring(encoder.coordinates.without_places))}


def test_pooled_is_the_mean_of_telling_scores(asked):
    _, encoder, _ = asked
    found = answers_of(asked)
    scoring = Scoring(encoder.coordinates.without_places)
    scores = [scoring.telling_score(one) for one in found]
    change = pooled(found, found, scoring)["held"]
    assert change.after == pytest.approx(sum(scores) / len(scores)) and change.count == 10


def test_an_unknown_task_with_boxes_is_judged_by_them():
    scoring = Scoring(str.strip)
    assert scoring.telling("parts", ["exact_match", "mean_iou", "acc_50"]) == "mean_iou"
    assert scoring.telling("parts", ["exact_match"]) == "exact_match"


def test_chosen_metrics_score_single_samples_where_they_can(asked):
    """Of a corpus metric a single sample has no value: the others are asked, or those that the task has by itself."""
    _, encoder, _ = asked
    found = answers_of(asked)
    task = found[0].sample.task

    def metrics(*names: str) -> tuple[list[str], str]:
        scoring = Scoring(encoder.coordinates.without_places, {task: names})
        scores = list(scoring.scores(found[0]))
        return scores, scoring.telling(task, scores)

    assert metrics("bleu", "rouge_l", "anls") == (["rouge_l", "anls"], "rouge_l")
    default = list(Scoring(encoder.coordinates.without_places).scores(found[0]))
    assert metrics("bleu", "cider")[0] == default

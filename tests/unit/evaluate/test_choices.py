"""Answers ranked by probability: against the model's own loss, and the rule of length (SPEC G6)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_setup import encode_all, encoder_of, write_data

from vlmtune.data.sources import FileSource
from vlmtune.evaluate.choices import Choice, ChoiceRule, choice_metrics, score_choices, true_answer
from vlmtune.models.load import load_model
from vlmtune.models.tiny import FAMILIES
from vlmtune.types import Sample, Text, Turn, VlmtuneError


def ask(answer: str = "red", task: str = "vqa", **meta) -> Sample:
    turns = (Turn("user", (Text("what color is the circle"),)), Turn("assistant", (Text(answer),)))
    return Sample("a", turns, task, "t.jsonl:3", meta)


@pytest.fixture(scope="module")
def llava(tiny_folder, tmp_path_factory):
    folder = tiny_folder("llava")
    return load_model(str(folder)).eval(), encoder_of(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_true_answer_has_the_probability_of_the_model_s_own_loss(tiny_folder, tmp_path, family):
    """transformers' mean loss over the same labels, times their number; images, several turns and padding included."""
    folder = tiny_folder(family)
    model, encoder = load_model(str(folder)).eval(), encoder_of(folder)
    source = FileSource(write_data(tmp_path, 6))
    samples = [source[n] for n in range(source.size)]
    asked = [(sample, [true_answer(sample), "two big circle"]) for sample in samples]
    found = score_choices(model, encoder, asked, batch_size=5)
    for sample, encoded, choices in zip(samples, encode_all(encoder, tmp_path / "train.jsonl"), found, strict=True):
        last = int(encoded.turn[encoded.supervised()].max())
        labels = torch.where(encoded.supervised() & (encoded.turn == last), encoded.ids, -100)
        extras = {name: value[None] for name, value in encoded.token_extras.items()}
        with torch.no_grad():
            loss = model(input_ids=encoded.ids[None], labels=labels[None], **extras, **encoded.pixels).loss
        assert choices[0].tokens == int((labels != -100).sum()), sample.id
        # float32 sums in another order
        assert choices[0].log_probability == pytest.approx(-float(loss) * choices[0].tokens, rel=1e-4)


def test_probabilities_do_not_depend_on_the_batch(llava):
    asked = [(ask(), ["red", "a big blue square left", "two"]), (ask("two"), ["two", "one"])]
    one, many = (score_choices(*llava, asked, batch_size=size) for size in (1, 5))
    for alone, together in zip(sum(one, []), sum(many, []), strict=True):
        assert (alone.text, alone.tokens) == (together.text, together.tokens)
        assert alone.log_probability == pytest.approx(together.log_probability, rel=1e-5)


def test_length_counts_as_alpha_says():
    """log p of -4 over 2 tokens and -6 over 6: the short one wins at 0, the long one at 1; equal at 6/4 = 3**alpha."""
    short, long = Choice("short", -4.0, 2), Choice("long", -6.0, 6)
    assert short.score(0.0) > long.score(0.0) and short.score(1.0) < long.score(1.0)
    even = 0.36907  # ln 1.5 / ln 3
    assert short.score(even) == pytest.approx(long.score(even), rel=1e-4)


def test_accuracy_by_task_and_choices_of_rows_before_those_of_tasks(llava):
    model, encoder = llava
    rule = ChoiceRule({"vqa": ["red", "blue"]}, alpha=0.0)
    samples = [ask("red"), ask("blue"), ask("two", choices=["one", "two"]), ask("x", task="caption")]
    asked = [(samples[0], ["red", "blue"]), (samples[2], ["one", "two"])]
    colours, numbers = (max(c, key=lambda choice: choice.log_probability).text for c in score_choices(*llava, asked, 4))
    expected = (1 + (numbers == "two")) / 3, "one of the two colours is always right"
    assert list(choice_metrics(model, encoder, samples, rule, 4)) == [("vqa", "choice_accuracy", expected[0])]
    assert colours in ("red", "blue")


def test_tasks_without_choices_are_left_alone(llava):
    assert list(choice_metrics(*llava, [ask(), ask()], ChoiceRule({"caption": ["a", "b"]}), 4)) == []


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (ask("green"), "its answer 'green' is none of the choices (red, blue)"),
        (ask(choices="red"), "meta.choices is a list of texts, not red"),
        (ask(choices=["red", " "]), "meta.choices is a list of texts"),
        (ask(choices=["red"]), "at least two different texts"),
        (ask(choices=["red", "red ", "blue"]), "at least two different texts"),
    ],
)
def test_choices_that_make_no_sense_name_the_sample(sample, said):
    with pytest.raises(VlmtuneError) as caught:
        ChoiceRule({"vqa": ["red", "blue"]}).choices(sample)
    assert said in str(caught.value) and str(caught.value).startswith("t.jsonl:3 (sample a)")


def test_earlier_replies_are_context(llava):
    """What was said before is not part of the answer's probability, but changes it."""
    turns = ask().turns
    longer = replace(
        ask(), turns=(Turn("user", (Text("how many"),)), Turn("assistant", (Text("two three one"),)), *turns)
    )
    (alone,), (after,) = score_choices(*llava, [(ask(), ["red"]), (longer, ["red"])], 2)
    assert alone.tokens == after.tokens and alone.log_probability != after.log_probability

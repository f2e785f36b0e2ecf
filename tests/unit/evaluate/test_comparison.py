"""Figures of a comparison against closed forms: what is paired with what, and what is left empty."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.evaluate.comparison import (
    SETTLING,
    HeldOut,
    Scores,
    Step,
    Trial,
    compare_trials,
    telling,
)
from vlmtune.evaluate.intervals import Interval, ratio_interval, t_interval

MACHINE = {"device": "cpu", "threads": 1}


def scores(vqa: list[float], caption: list[float], loss: float) -> Scores:
    """Held-out samples of two tasks; every sample has two tokens."""
    samples = [
        HeldOut("val", f"{task}{n}", task, loss * 2, 2, {metric: value})
        for task, metric, values in (("vqa", "exact_match", vqa), ("caption", "f1", caption))
        for n, value in enumerate(values)
    ]
    metrics = {"loss": loss, "loss/val/vqa": loss, "loss/val/caption": loss}
    metrics |= {"val/vqa/exact_match": float(np.mean(vqa)), "val/caption/f1": float(np.mean(caption))}
    return Scores(metrics, telling(metrics, {}), samples)


def trial(arm: str, seed: int, quality: float, seconds: float, peak: int | None = 100, steps: int = 20) -> Trial:
    timed = [Step(n, seconds, 4, seconds / 2) for n in range(1, steps + 1)]
    held_out = scores([1.0, quality], [quality, quality], 2 - quality)
    return Trial(arm, seed, None, 10, 100, peak, {"weights fp32": 50}, timed, held_out, MACHINE)


BASE = scores([0.0, 0.0], [0.0, 0.0], 4.0)


def test_ratios_are_paired_by_seed():
    trials = [trial("full", s, 0.6 + s / 10, 2.0, 100) for s in range(3)]
    trials += [trial("lora", s, 0.5 + s / 20, 1.0 + s / 10, 60 + s) for s in range(3)]
    found = compare_trials(trials, BASE, ["full", "lora"], "full")
    full, lora = found.rows
    assert found.over == "seeds" and (full.memory_ratio, full.speed_ratio, full.score.ratio) == (None, None, None)
    assert lora.memory_ratio == ratio_interval([0.60, 0.61, 0.62])
    assert lora.speed_ratio == ratio_interval([2 / (1.0 + s / 10) for s in range(3)])
    assert full.speed.value == pytest.approx(4 / 2.0)
    mine = [np.mean([(1 + 0.5 + s / 20) / 2, 0.5 + s / 20]) for s in range(3)]
    theirs = [np.mean([(1 + 0.6 + s / 10) / 2, 0.6 + s / 10]) for s in range(3)]
    assert lora.score.value.value == pytest.approx(np.mean(mine))
    for figure, values in (
        (lora.score.difference, np.subtract(mine, theirs)), (lora.score.ratio, np.divide(mine, theirs)),
        (lora.score.gain, np.divide(mine, theirs)),  # the base has 0
        (lora.loss.gain, [(4 - (1.5 - s / 20)) / (4 - (1.4 - s / 10)) for s in range(3)]),
    ):  # fmt: skip
        expected = t_interval(values)
        assert figure == Interval(*map(pytest.approx, (expected.value, expected.low, expected.high)))


def test_a_busy_moment_is_one_step_of_many_and_the_first_steps_are_none():
    full, lora = trial("full", 0, 0.5, 2.0), trial("lora", 0, 0.5, 1.0)
    slow = [replace(s, seconds=50.0) if s.step <= SETTLING or s.step == 10 else s for s in lora.steps]
    found = compare_trials([full, replace(lora, steps=slow)], BASE, ["full", "lora"], "full")
    assert found.row("lora").speed_ratio == Interval(2.0, 2.0, 2.0)
    assert set(replace(lora, steps=slow).timed()) == set(range(SETTLING + 1, 21))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_short_run_keeps_a_step_to_time(steps):
    assert len(trial("lora", 0, 0.5, 1.0, steps=steps).timed()) == max(1, steps - SETTLING)


def test_one_seed_is_resampled_over_samples():
    generator = np.random.default_rng(0)
    hard = generator.random(400)
    mine, theirs = (hard < 0.5).astype(float), (hard < 0.6).astype(float)  # right wherever the other is, less often
    trials = [
        replace(trial("full", 0, 0.5, 2.0), scores=scores(list(theirs), [0.5, 0.5], 1.0)),
        replace(trial("lora", 0, 0.5, 1.0), scores=scores(list(mine), [0.5, 0.5], 2.0)),
    ]
    base = scores([0.0] * 400, [0.0, 0.0], 4.0)
    found = compare_trials(trials, base, ["full", "lora"], "full")
    lora = found.row("lora")
    figure = next(f for f in lora.metrics if f.name == "val/vqa/exact_match")
    gap = mine - theirs
    assert found.over == "samples" and lora.memory_ratio == Interval(pytest.approx(1.0))
    assert figure.difference.value == pytest.approx(gap.mean())
    half = 1.96 * gap.std() / 400**0.5  # of the paired difference; unpaired it would be four times as wide
    assert figure.difference.high - figure.difference.low == pytest.approx(2 * half, rel=0.1)
    assert figure.ratio.value == pytest.approx(mine.mean() / theirs.mean()) and figure.ratio.high < 1
    assert lora.loss.difference == Interval(1.0, pytest.approx(1.0), pytest.approx(1.0))
    assert "nothing about other seeds" in " ".join(found.notes).replace("they say ", "")


def test_a_share_of_no_gain_is_no_figure():
    same = scores([0.5, 0.5], [0.5, 0.5], 1.0)
    trials = [trial("full", s, 0.5, 1.0) for s in range(3)] + [trial("lora", s, 0.6, 1.0) for s in range(3)]
    trials = [replace(t, scores=same if t.arm == "full" else t.scores) for t in trials]
    found = compare_trials(trials, same, ["full", "lora"], "full")
    assert found.row("lora").score.gain is None and found.row("lora").score.ratio is not None
    assert any("no share" in note for note in found.notes)


def test_without_a_base_nothing_is_a_share_of_a_gain():
    trials = [trial(arm, s, 0.5, 1.0) for arm in ("full", "lora") for s in range(2)]
    found = compare_trials(trials, None, ["full", "lora"], "full")
    assert found.base == {} and found.row("lora").score.gain is None


def test_failures_are_named_and_the_rest_is_compared():
    trials = [trial("full", 0, 0.5, 1.0), Trial("full", 1, "it broke"), Trial("ia3", 0, "no room")]
    trials += [trial("lora", 0, 0.5, 1.0), trial("lora", 1, 0.5, 1.0)]
    found = compare_trials(trials, BASE, ["full", "lora", "ia3"], "full")
    full, lora, ia3 = found.rows
    assert full.failed == {1: "it broke"} and full.seeds == [0]
    assert lora.speed_ratio.value == 1.0, "from the one seed that both have"
    assert ia3.failed == {0: "no room"} and ia3.seeds == [] and ia3.score is None
    assert "full: without seed 1, which failed" in found.notes
    assert any(note.startswith("full, lora: one seed to compare") for note in found.notes)


def test_without_the_baseline_nothing_is_relative():
    found = compare_trials([Trial("full", 0, "no room"), trial("lora", 0, 0.5, 1.0)], BASE, ["full", "lora"], "full")
    lora = found.row("lora")
    assert (lora.memory_ratio, lora.speed_ratio, lora.score.ratio, lora.loss.difference) == (None,) * 4
    assert any("full has no finished trial" in note for note in found.notes)


def test_another_baseline_and_another_machine_are_said():
    trials = [trial("lora", 0, 0.5, 1.0), replace(trial("ia3", 0, 0.5, 1.0), machine=MACHINE | {"threads": 2})]
    found = compare_trials(trials, BASE, ["lora", "ia3"], "lora")
    assert any("ratios are to lora" in note for note in found.notes)
    assert any("threads" in note for note in found.notes)


def test_on_a_busy_machine_processor_time_is_what_counts():
    """The clock of one trial runs twice as fast for the same work; a GPU's time is not the processor's."""
    full, lora = trial("full", 0, 0.5, 2.0), trial("lora", 0, 0.5, 1.0)
    full = replace(full, steps=[replace(step, cpu=None if step.step == 9 else 1.0) for step in full.steps])
    lora = replace(lora, steps=[replace(step, cpu=0.9) for step in lora.steps])
    found = compare_trials([full, lora], BASE, ["full", "lora"], "full")
    assert found.row("lora").speed_ratio.value == 2.0
    assert found.row("lora").cpu_ratio.value == pytest.approx(1 / 0.9)
    assert any("trials had 50% to 90% of the one processor" in note for note in found.notes)
    for machine in (MACHINE | {"device": "NVIDIA X"}, MACHINE | {"threads": 4}):
        elsewhere = compare_trials([replace(t, machine=machine) for t in (full, lora)], BASE, ["full", "lora"], "full")
        assert not any("busy" in note for note in elsewhere.notes)
        assert (elsewhere.row("lora").cpu_ratio is None) == (machine["device"] != "cpu")


def test_memory_that_the_system_does_not_tell_is_left_empty():
    found = compare_trials([trial(arm, 0, 0.5, 1.0, None) for arm in ("full", "lora")], BASE, ["full", "lora"], "full")
    assert found.row("lora").memory is None and found.row("lora").memory_ratio is None


def test_the_score_counts_the_first_metric_of_each_task():
    metrics = {
        "loss": 1.0, "loss/a/ocr": 1.0, "a/ocr/exact_match": 0.0, "a/ocr/anls": 0.4, "a/mine/exact_match": 0.2,
        "b/grounding/acc_50": 1.0, "b/grounding/mean_iou": 0.6, "b/quiz/choice_accuracy": 0.8,
    }  # fmt: skip
    names = telling(metrics, {})
    assert names == ["a/ocr/anls", "a/mine/exact_match", "b/grounding/mean_iou", "b/quiz/choice_accuracy"]
    assert Scores(metrics, names, []).score == pytest.approx(0.5)
    assert telling(metrics, {"ocr": ["exact_match", "anls"]})[0] == "a/ocr/exact_match"
    assert Scores(metrics, telling({"loss": 1.0, "loss/a/ocr": 1.0}, {}), []).score is None


def test_a_metric_without_values_of_samples_has_no_bootstrap():
    """Nor has a score that it is part of."""
    trials = []
    for arm in ("full", "lora"):
        one = trial(arm, 0, 0.5, 1.0)
        metrics = one.scores.metrics | {"val/quiz/choice_accuracy": 0.5}
        trials.append(replace(one, scores=Scores(metrics, telling(metrics, {}), one.scores.samples)))
    found = compare_trials(trials, None, ["full", "lora"], "full").row("lora")
    figure = next(f for f in found.metrics if f.name == "val/quiz/choice_accuracy")
    assert figure.value == Interval(0.5) and figure.difference == Interval(0.0)
    assert found.score.value == Interval(pytest.approx((0.75 + 0.5 + 0.5) / 3)) and found.loss.value.low is not None


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.floats(0.1, 10))
def test_a_method_compared_with_itself_is_once_as_fast(seconds, peak):
    steps = [Step(n, s, 4) for n, s in enumerate(seconds, 1)]
    both = [replace(trial(arm, 0, 0.5, 1.0, int(peak * 1e6)), steps=steps) for arm in ("full", "lora")]
    row = compare_trials(both, BASE, ["full", "lora"], "full").row("lora")
    assert row.speed_ratio.value == 1.0 and row.memory_ratio.value == pytest.approx(1.0)
    assert row.score.ratio.value == 1.0 and row.score.difference == Interval(0.0, 0.0, 0.0)


def test_a_record_gives_the_scores_back():
    assert Scores.from_record(BASE.as_record()) == BASE

"""Judgements over a run: each fires for its reason, none on what is healthy (SPEC D5, D8)."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.checks.during import FIRST, PAUSE, GradientWatch, LossWatch, StartWatch, judge_overflow, judge_statistics
from vlmtune.optim.statistics import Row
from vlmtune.types import Finding

HEALTHY = Row(mean=0.0, std=1e-3, largest=1e-2, norm=0.1, weight=0.05, update=5e-5, is_matrix=True)


def rows(**changed: Row) -> dict[str, Row]:
    return {f"language.layers.{n}.weight": HEALTHY for n in range(5)} | changed


def whats(now: dict[str, Row], earlier=()) -> list[str]:
    return [finding.what for finding in judged(now, earlier)]


def judged(now: dict[str, Row], earlier) -> list[Finding]:
    return judge_statistics(now, [{name: row.norm for name, row in past.items()} for past in earlier])


def test_healthy_gradients_pass():
    assert whats(rows(), [rows()] * 5) == []


def test_a_norm_far_above_its_own_median_explodes():
    """Twice in a row, or so far that no batch explains it; one batch alone may well reach 40 times."""
    calm, high, burst = (rows(a=replace(HEALTHY, norm=norm)) for norm in (0.1, 2.0, 15.0))
    (finding,) = judged(high, [calm, calm, calm, high])
    assert finding.what == "gradients explode" and "worst a: norm 2, 20 x" in finding.evidence
    (finding,) = judged(burst, [calm] * 3)
    assert finding.what == "gradients explode" and "150 x" in finding.evidence
    assert whats(high, [calm] * 4) == [], "one batch"
    assert whats(high, [calm, calm, high, calm]) == [], "two, but not in a row"
    assert whats(burst, [calm] * 2) == [], "two measurements are no median"
    assert whats(rows(a=replace(HEALTHY, norm=0.9)), [calm, calm, calm, rows(a=replace(HEALTHY, norm=0.9))]) == []


@pytest.mark.parametrize("cut", range(1, 5))
def test_the_watch_of_gradients_resumes_exactly(cut):
    """Through JSON: what was measured before a stop counts after it."""
    calm, high = (rows(a=replace(HEALTHY, norm=norm)) for norm in (0.1, 2.0))
    first, second = GradientWatch(), GradientWatch()
    measured = [calm, calm, calm, high, high]
    said = [first.observe(now) for now in measured[:cut]]
    second.restore(json.loads(json.dumps(first.state())))
    said += [second.observe(now) for now in measured[cut:]]
    assert [[finding.what for finding in found] for found in said] == [[], [], [], [], ["gradients explode"]]


def test_a_gradient_far_below_the_others_vanishes():
    assert whats(rows(a=replace(HEALTHY, std=1e-10))) == ["gradients vanish"]
    bias = replace(HEALTHY, std=1e-10, is_matrix=False)
    assert whats(rows(a=bias)) == [], "keys' biases have a gradient of rounding errors alone"


def test_a_gradient_that_is_the_same_everywhere_has_not_vanished():
    """A gate of shape (1, 1) has no deviation at all."""
    assert whats(rows(a=replace(HEALTHY, mean=1e-3, std=0.0))) == []


def test_no_gradient_three_times_in_a_row_is_dead():
    zero = replace(HEALTHY, norm=0.0, std=0.0, largest=0.0)
    assert whats(rows(a=zero), [rows(a=zero)]) == []
    assert whats(rows(a=zero), [rows(a=HEALTHY), rows(a=zero)]) == []
    assert whats(rows(a=zero), [rows(a=zero), rows(a=zero)]) == ["parameters are dead"]


@pytest.mark.parametrize(
    ("update", "said"), [(0.02, "updates are large for their weights"), (1e-9, "updates are small for their weights")]
)
def test_updates_are_compared_with_their_weights(update, said):
    (finding,) = judged(rows(a=replace(HEALTHY, update=update)), ())
    assert finding.what == said and "worst a" in finding.evidence and finding.remedy


def test_weights_that_have_hardly_left_zero_may_move_far():
    """LoRA's B after its first steps."""
    assert whats(rows(a=replace(HEALTHY, weight=1e-3, update=1e-3))) == []


def watched(losses: list[float], watch: LossWatch | None = None) -> dict[int, str]:
    """Number of the step -> what was said."""
    watch = watch or LossWatch()
    found = {n: watch.observe(loss) for n, loss in enumerate(losses)}
    return {n: finding.what for n, finding in found.items() if finding is not None}


def falling(steps: int, noise: float, seed: int = 0) -> list[float]:
    """A loss from 5 to 0.5, with noise in proportion."""
    rng = random.Random(seed)
    return [(0.5 + 4.5 * 0.97**n) * (1 + noise * rng.gauss(0, 1)) for n in range(steps)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0, 0.12))
def test_a_loss_that_falls_with_noise_is_healthy(seed, noise):
    assert watched([max(loss, 0.01) for loss in falling(200, noise, seed)]) == {}


def test_batches_of_tasks_with_other_losses_are_healthy():
    """One task per batch, losses between 0.4 and 2, five times apart: at most one false alarm in 40,000 steps."""
    alarms = 0
    for seed in range(200):
        rng = random.Random(seed)
        alarms += len(watched([rng.choice((0.4, 0.8, 1.2, 2.0)) * rng.uniform(0.9, 1.1) for _ in range(200)]))
    assert alarms <= 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), at=st.integers(FIRST + 10, 150))
def test_a_jump_is_seen_in_its_step(seed, at):
    losses = falling(160, 0.05, seed)
    losses[at] *= 6
    assert watched(losses).get(at) == "the loss jumps"


def test_the_first_losses_are_not_judged():
    assert watched([1.0, 9.0, 1.0, 8.0, 1.0, 1.0]) == {}


def test_a_slow_climb_is_seen_and_said_once_for_each_further_climb():
    losses = [1.0] * 40 + [1.0 * 1.03**n for n in range(110)]
    said = watched(losses)
    assert set(said.values()) == {"the loss climbs"} and 1 < len(said) < 6
    steps = sorted(said)
    assert all(b - a > PAUSE for a, b in zip(steps, steps[1:], strict=False))


def test_a_jump_does_not_hide_the_next():
    losses = [1.0, 1.02] * 30
    losses[30], losses[30 + PAUSE + 2] = 20.0, 20.0
    assert set(watched(losses)) >= {30, 30 + PAUSE + 2}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 100))
def test_the_watch_resumes_exactly(seed, cut):
    """Through JSON, at any step."""
    rng = random.Random(seed)
    losses = [rng.uniform(0.5, 4.0) * (10 if rng.random() < 0.05 else 1) for _ in range(100)]
    first, second = LossWatch(), LossWatch()
    said = watched(losses[:cut], first)
    second.restore(json.loads(json.dumps(first.state())))
    said |= {cut + n: what for n, what in watched(losses[cut:], second).items()}
    assert said == watched(losses)


def test_stored_samples_that_do_worse_than_before_training_are_said_once():
    watch = StartWatch()
    watch.begin([0.1, 2.0, 6.0])
    said = [watch.observe([0.1 + up, 2.0 + up, 6.0 + up]) for up in (-0.1, 1.0, 1.4, 9.0, 1.0, 2.0)]
    assert [finding is not None for finding in said] == [False, False, True, False, False, True]
    assert "4.1, before the first step it was 2.7" in said[2].evidence


def test_small_losses_must_rise_by_half_a_nat():
    watch = StartWatch()
    watch.begin([0.01])
    assert watch.observe([0.4]) is None and watch.observe([0.6]) is not None


def test_stored_samples_that_are_not_finite_are_worse():
    watch = StartWatch()
    watch.begin([1.0])
    assert watch.observe([math.nan]) is not None


def test_without_losses_from_before_training_nothing_is_said():
    assert StartWatch().observe([100.0]) is None


def test_the_comparison_with_the_start_resumes_exactly():
    first, second = StartWatch(), StartWatch()
    first.begin([1.0])
    assert first.observe([5.0]) is not None
    second.restore(json.loads(json.dumps(first.state())))
    assert second.has_begun and second.observe([5.0]) is None and second.observe([1.0]) is None
    assert second.observe([5.0]) is not None


def test_overflows_are_said_when_they_become_frequent_and_when_no_scale_helps():
    scale = 2.0**16
    fine = [scale] * 30
    assert judge_overflow([*fine, scale / 2]) == []
    frequent = [*fine, *(scale / 2**n for n in range(1, 6))]
    (finding,) = judge_overflow(frequent)
    assert finding.level == "warn" and "5 of the last 20" in finding.evidence
    assert judge_overflow([*frequent, scale / 2**6]) == [], "said already"
    every_fourth = [scale / 2 ** (n // 4) for n in range(64)]
    said = [n for n in range(4, 64, 4) if judge_overflow(every_fourth[: n + 1])]
    assert len(said) == 3, "one line for five overflows, however they are spread"
    (finding,) = judge_overflow([2.0, 1.0, 0.5])
    assert finding.level == "fail" and "0.5" in finding.evidence

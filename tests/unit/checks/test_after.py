"""What the records of a run say: each complaint for its reason, none about a run that went well (SPEC G8, H4)."""

from __future__ import annotations

import math

import pytest
import torch

from vlmtune.checks.after import (
    EIGHTHS,
    Spread,
    course_findings,
    data_findings,
    gradient_findings,
    outcome_findings,
    sparkline,
    weight_findings,
)
from vlmtune.types import Finding

SOURCE = {"source": "a.jsonl", "rows": 1000, "samples": 500, "tokens": 200.0, "supervised_tokens": 20.0}


def odd(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    assert all(finding.evidence for finding in findings)
    return {f.what: (f.level, f.evidence) for f in findings if f.level != "pass"}


def run(losses: list[float], held_out: dict[int, float] | None = None, **last) -> list[dict]:
    """A history with a record every 10 steps."""
    records = [
        {"kind": "train", "step": 10 * (n + 1), "loss": loss, "data_wait": 0.02, "seconds": 60.0 * (n + 1),
         "skipped": 0, "overflows": 0, "lr_scale": 1.0, "sources": {"a.jsonl": 40 * (n + 1)}}
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    records[-1] |= last
    records += [{"kind": "eval", "step": step, "loss": {"loss": loss}} for step, loss in (held_out or {}).items()]
    return sorted(records, key=lambda record: record["step"])


FALLING = [3.0 * 0.9**n + 0.5 for n in range(20)]


def test_a_run_that_went_well():
    history = run(FALLING, {50: 2.0, 100: 1.5, 200: 1.4})
    assert odd(data_findings([SOURCE], 3, history)) == {}
    findings = course_findings([{"level": "pass", "what": "x", "evidence": "y", "remedy": ""}], history, 200)
    assert odd(findings) == {} and {"the training loss fell", "the held-out loss follows"} <= {f.what for f in findings}


@pytest.mark.parametrize(
    ("row", "dropped", "what", "said"),
    [
        ({}, 200, "most rows are used", "200 of 1,200 left out"),
        ({"supervised_tokens": 1.0}, 0, "there is something to learn in every source", "a.jsonl 0.5%"),
        ({"source": "b.jsonl"}, 0, "every source was read", "not one sample of b.jsonl"),
    ],
)
def test_what_is_wrong_with_the_data(row, dropped, what, said):
    found = odd(data_findings([SOURCE | row], dropped, run(FALLING)))
    assert list(found) == [what] and said in found[what][1]


@pytest.mark.parametrize(
    ("history", "what", "level", "said"),
    [
        (run([1.0] * 20), "the training loss fell", "warn", "hardly: from 1 to 1"),
        (run([1.0 + 0.1 * n for n in range(20)]), "the training loss fell", "fail", "no, it rose from 1.1"),
        (run(FALLING, {50: 1.0, 100: 0.9, 200: 1.5}), "the held-out loss follows", "warn", "lowest 0.9 at step 100"),
        (run(FALLING, skipped=30), "steps make updates", "fail", "30 of 200 steps made none"),
        (run(FALLING, overflows=30), "steps make updates", "fail", "30 of 200 steps made none"),
        ([r | {"data_wait": 0.6} for r in run(FALLING)], "data is there in time", "warn", "60% of 1,200 s"),
    ],
)
def test_what_is_wrong_with_the_course(history, what, level, said):
    found = odd(course_findings([], history, 200))
    assert list(found) == [what] and found[what][0] == level and said in found[what][1]


def test_a_wait_of_seconds_is_none():
    history = [r | {"data_wait": 0.6, "seconds": r["seconds"] / 20} for r in run(FALLING)]
    assert odd(course_findings([], history, 200)) == {}


def test_short_runs_are_not_judged_by_their_trend():
    assert odd(course_findings([], run([1.0, 2.0, 3.0]), 30)) == {}


def test_findings_of_the_run_are_said_once_each():
    told = {
        "kind": "finding",
        "level": "warn",
        "what": "the loss jumps",
        "evidence": "9 where it was 1",
        "remedy": "look",
    }
    history = [*run(FALLING), told | {"step": 30}, told | {"step": 50}, told | {"step": 90}]
    found = odd(course_findings([], history, 200))
    assert found == {"in the run: the loss jumps": ("warn", "step 30 and 2 times more: 9 where it was 1")}


@pytest.mark.parametrize(("after", "is_odd"), [(0.4, False), (1.25, False), (1.4, True)])
def test_a_task_that_got_worse(after, is_odd):
    metrics = {"old/vqa": {"loss": {"before": 1.0, "after": after}, "accuracy": {"before": 0.5, "after": 0.1}},
               "new/vqa": {"loss": {"before": 2.0, "after": 0.5}}, "new/ocr": {"loss": {"after": 9.0}}}  # fmt: skip
    found = odd(outcome_findings(metrics))
    assert (list(found) == ["no held-out task got worse"]) == is_odd
    assert not is_odd or "the loss rose: old/vqa 1 -> 1.4" in found["no held-out task got worse"][1]


def test_no_evaluation_has_no_outcome():
    assert outcome_findings({}) == [] and outcome_findings({"new/ocr": {"loss": {"after": 9.0}}}) == []


def spreads(**changed: Spread) -> dict[str, Spread]:
    """Trained tensors of a healthy run."""
    torch.manual_seed(0)
    names = ("projector.weight", "language.0.lora_A.weight", "language.0.lora_B.weight", "language.1.lora_B.weight")
    return {name: Spread.of(0.02 * torch.randn(16, 16)) for name in names} | changed


def test_spread_of_a_tensor():
    spread = Spread.of(torch.tensor([[1.0, -3.0], [2.0, 0.0]], dtype=torch.bfloat16))
    assert (spread.largest, spread.numbers, spread.is_finite) == (3.0, 4, True)
    assert spread.std == pytest.approx(math.sqrt(3.5))
    assert not Spread.of(torch.tensor([1.0, math.nan])).is_finite


def test_healthy_weights():
    assert odd(weight_findings(spreads(), 100)) == {}


ZERO = Spread.of(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("found", "what", "level", "said"),
    [
        (spreads(bad=Spread.of(torch.tensor([math.inf]))), "weights are finite", "fail", "1 of 5 tensors are not"),
        (spreads(big=Spread.of(torch.tensor([5e4]))), "no weight has grown out of range", "warn", "5e+04, in big"),
        (spreads(**{"language.1.lora_B.weight": ZERO}), "adapters have left 0", "warn", "1 of 2 have not"),
        (
            spreads(**{f"language.{n}.lora_B.weight": ZERO for n in (0, 1)}),
            "adapters have left 0", "fail", "2 of 2 have not after 100 steps",
        ),
        ({}, "something was trained", "fail", "holds no tensor"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_weights(found, what, level, said):
    complaints = odd(weight_findings(found, 100))
    assert list(complaints) == [what] and complaints[what][0] == level and said in complaints[what][1]


def test_adapters_of_step_0_are_at_0():
    assert odd(weight_findings({"language.0.lora_B.weight": ZERO}, 0)) == {}


def test_gradients_that_stand_out_and_those_that_never_came():
    healthy = {f"t{n}": 1e-3 * (n + 1) for n in range(6)}
    assert odd(gradient_findings(healthy)) == {}
    assert "largest 5.00e+01 in big" in odd(gradient_findings(healthy | {"big": 50.0}))["no gradient stands out"][1]
    assert "1 of 7 tensors never had one, first none" in str(odd(gradient_findings(healthy | {"none": 0.0})))
    assert "no gradient stands out" in odd(gradient_findings(healthy | {"broken": math.nan}))
    assert gradient_findings({}) == []


def test_a_line_of_eighths():
    assert sparkline([0.0, 1.0]) == EIGHTHS[0] + EIGHTHS[7]
    assert sparkline([1.0] * 5) == EIGHTHS[0] * 5
    line = sparkline([float(n) for n in range(1000)], width=40)
    assert len(line) == 40 and list(line) == sorted(line)


def mixed(easy: list[float | None], hard: list[float | None]) -> list[dict]:
    """Records whose loss is the mean of the tasks that their batch had."""
    history = run([1.0] * len(easy))
    for record, *pair in zip(history, easy, hard, strict=True):
        tasks = {name: loss for name, loss in zip(("easy", "hard"), pair, strict=True) if loss is not None}
        record |= {"loss_by_task": tasks, "loss": sum(tasks.values()) / len(tasks)}
    return history


def trend(history: list[dict]) -> tuple[str, str]:
    return next((f.level, f.evidence) for f in course_findings([], history, 200) if f.what == "the training loss fell")


def test_the_trend_is_that_of_every_task_not_of_their_mixture():
    """The first batches are of the easy task, the last ones of the hard one: both fall, and the mean rises."""
    falling = [1 - 0.02 * n for n in range(20)]
    easy = [loss if n < 16 or n % 2 else None for n, loss in enumerate(falling)]
    hard = [9 * loss if n > 3 or n % 2 else None for n, loss in enumerate(falling)]
    history = mixed(easy, hard)
    assert history[-2]["loss"] > history[0]["loss"]
    assert trend(history)[0] == "pass"
    rising = [1 + 0.05 * n for n in range(20)]
    assert trend(mixed(rising, [9 * loss for loss in rising]))[0] == "fail"


def test_a_loss_that_scatters_more_than_it_moves_is_not_judged():
    scattered = [2.0, 6.0, 3.0, 5.0, 2.5, 6.0, 3.0, 5.5, 2.5, 6.5]
    level, evidence = trend(run(scattered))
    assert level == "pass" and "cannot be told yet" in evidence
    assert trend(run([4.0, 4.02] * 10))[0] == "warn", "little scatter, and no trend"

"""history.jsonl: weighted means, each step once whatever kills the run, torn lines left out."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vlmtune.observe.log import History, ProgressLine, duration, keep_until, read_history, train_record
from vlmtune.optim.statistics import Row
from vlmtune.types import Finding


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(
        step=step, samples=4 * step, seconds=1.5 * step, lr_scale=1.0, skipped=[2] if step > 2 else [], overflows=0
    )


def metrics(caption: tuple[float, int], vqa: tuple[float, int] | None = None, seconds: float = 0.5) -> dict:
    """(mean token loss, supervised tokens) of each task in one step, as `Trainer.train_step` reports it."""
    parts = {"caption": caption} | ({"vqa": vqa} if vqa else {})
    means = {task: mean for task, (mean, _) in parts.items()}
    tokens = {task: n for task, (_, n) in parts.items()}
    return {
        "losses": means, "plain": {task: 2 * mean for task, mean in means.items()},
        "weights": {task: n / 4 for task, n in tokens.items()}, "supervised": tokens, "coefficients": {"caption": 0.5},
        "norms": {"language": torch.tensor(3.0), "projector": torch.tensor(4.0), "total": torch.tensor(5.0)},
        "lr": {"language": 1e-3, "projector": 1e-4},
        "shares": {}, "terms": {"box": caption[0] / 2}, "term_counts": {"box": caption[1]}, "exposure": 0.25,
        "scale": 1.0, "statistics": None, "samples": 4, "tokens": 100, "data_wait": 0.1, "step_seconds": seconds,
    }  # fmt: skip


def memory() -> int:
    return 3 << 20


def by_source(samples: int) -> dict[str, int]:
    return {"a.jsonl": samples - samples // 4, "b.jsonl": samples // 4}


def test_means_are_weighted_by_tokens():
    """The record holds the means over all tokens since the last one."""
    record = train_record(state(2), [metrics((2.0, 30), (1.0, 10)), metrics((4.0, 10), seconds=1.5)])
    assert record["loss"] == pytest.approx((2.0 * 30 + 1.0 * 10 + 4.0 * 10) / 50, rel=1e-6)
    assert record["loss_by_task"] == pytest.approx({"caption": (60 + 40) / 40, "vqa": 1.0}, rel=1e-6)
    assert record["loss_plain"] == pytest.approx(2 * record["loss"])
    assert record["loss_plain_by_task"] == pytest.approx({"caption": 2 * (60 + 40) / 40, "vqa": 2.0})
    assert record["task_weights"] == {"caption": 0.5}
    assert record["tokens_per_second"] == 100 and record["samples_per_second"] == 4
    assert record["supervised_tokens_per_second"] == 25 and record["data_wait"] == pytest.approx(0.1)
    assert record["norm"] == 5 and record["norm_by_rule"] == {"language": 3, "projector": 4}


def test_logs_the_first_step_and_every_nth(tmp_path):
    history = History(tmp_path / "history.jsonl", 3, 0, by_source, memory)
    for step in range(1, 8):
        history.on_step(state(step), metrics((float(step), 10)))
    records = read_history(tmp_path / "history.jsonl")
    assert [r["step"] for r in records] == [1, 3, 6]
    assert {r["memory"] for r in records} == {3 << 20}
    assert [r["loss"] for r in records] == pytest.approx([1.0, 2.5, 5.0])  # since the record before: 2-3, 4-6


def test_every_record_counts_the_samples_of_each_source(tmp_path):
    history = History(tmp_path / "history.jsonl", 1, 0, by_source, memory)
    for step in (1, 2):
        history.on_step(state(step), metrics((1.0, 10)))
    records = read_history(tmp_path / "history.jsonl")
    assert [r["sources"] for r in records] == [{"a.jsonl": 3, "b.jsonl": 1}, {"a.jsonl": 6, "b.jsonl": 2}]


def test_a_torn_line_is_left_out_and_written_again(tmp_path):
    """Killed in the middle of a write at step 3, after the checkpoint of step 2."""
    path = tmp_path / "history.jsonl"
    history = History(path, 1, 0, by_source, memory)
    for step in (1, 2, 3):
        history.on_step(state(step), metrics((1.0, 10)))
    path.write_text(path.read_text()[:-40])
    assert [r["step"] for r in read_history(path)] == [1, 2]
    resumed = History(path, 1, 2, by_source, memory)
    resumed.on_step(state(3), metrics((1.0, 10)))
    assert [r["step"] for r in read_history(path)] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path, 1, 0, by_source, memory)
    for step in (1, 2, 3, 4):
        history.on_step(state(step), metrics((1.0, 10)))
    history.on_eval(state(4), {"loss": 1.0})
    keep_until(path, 2)
    assert [r["step"] for r in read_history(path)] == [1, 2]
    keep_until(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_an_evaluation_is_recorded_once(tmp_path):
    """Resumed exactly where an evaluation was made, it is not written a second time."""
    path = tmp_path / "history.jsonl"
    values = {"loss": 1.5, "loss/val/vqa": 1.5, "val/vqa/exact": 0.25}
    History(path, 1, 0, by_source, memory).on_eval(state(2), values)
    again = History(path, 1, 2, by_source, memory)
    again.on_eval(state(2), values)
    again.on_eval(state(4), values)
    records = read_history(path)
    assert [r["step"] for r in records] == [2, 4]
    assert records[0]["metrics"] == {"val/vqa": {"exact": 0.25}}
    assert records[0]["loss"] == {"loss": 1.5, "val/vqa": 1.5}


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    line = ProgressLine(Console(file=out, width=200), total_steps=4, log_every=2)
    with line:
        for step in range(1, 5):
            line.on_step(state(step), metrics((float(step), 10 * step)))
    lines = [text.split("  ")[:2] for text in out.getvalue().splitlines()]
    # of steps 3 and 4: (3 * 30 + 4 * 40) / 70
    assert lines == [["step 1/4", "loss 1.0000"], ["step 2/4", "loss 2.0000"], ["step 4/4", "loss 3.5714"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3723, "1:02:03"), (float("inf"), "?"), (float("nan"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_step_that_was_left_out_is_counted_and_no_part_of_the_means(tmp_path):
    history = History(tmp_path / "history.jsonl", 2, 0, by_source, memory)
    history.on_step(state(1), metrics((1.0, 10)))
    history.on_step(state(2), metrics((2.0, 10)))
    history.on_step(state(3), {"skipped": True, "samples": 4, "tokens": 100})
    history.on_step(state(4), metrics((5.0, 10)))
    last = read_history(tmp_path / "history.jsonl")[-1]
    assert last["step"] == 4 and last["loss"] == pytest.approx(5.0) and last["skipped"] == 1


def test_findings_and_statistics_are_written_and_dropped_when_the_run_goes_back(tmp_path):
    """What will come again is not recorded twice; what was found before stays."""
    history = History(tmp_path / "history.jsonl", 1, 0, by_source, memory)
    rows = {"language.a": Row(0.0, 1.0, 2.0, 3.0, 0.5, 0.25, True)}
    for step in range(1, 5):
        history.on_step(state(step), metrics((float(step), 10)) | {"statistics": rows if step % 2 == 0 else None})
        history.on_finding(state(step), Finding("warn", "loss", f"jumped at {step}", "look"))
    history.on_rewind(state(2))
    records = read_history(tmp_path / "history.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [("train", 1), ("finding", 1), ("train", 2), ("finding", 2)]
    assert records[1]["evidence"] == "jumped at 1" and records[1]["level"] == "warn"
    assert [r["step"] for r in read_history(tmp_path / "gradients.jsonl")] == [2]
    assert read_history(tmp_path / "gradients.jsonl")[0]["parameters"]["language.a"]["std"] == 1.0


def test_the_last_step_is_recorded_whatever_the_interval(tmp_path):
    history = History(tmp_path / "history.jsonl", 10, 0, by_source, memory, last=4)
    for step in (1, 2, 3, 4):
        history.on_step(state(step), metrics((float(step), 10)))
    assert [record["step"] for record in read_history(tmp_path / "history.jsonl")] == [1, 4]

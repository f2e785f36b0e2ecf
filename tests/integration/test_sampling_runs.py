"""data.sampling through `vlmtune train`: drawn as asked, logged, resumed bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from run_setup import run_of, sampled_data, trained

from vlmtune.observe.log import read_history

SAMPLING = {
    "every_task": {"by": "every_task"},
    "grouped": {"by": "grouped"},
    "temperature": {"by": "temperature", "temperature": 0.5, "every": 2},
}


@pytest.mark.parametrize("by", SAMPLING)
def test_a_run_draws_as_asked_and_resumes_exactly(by, rows, write_config, vlmtune):
    config = write_config("run", 6, data=sampled_data(rows, SAMPLING[by]), checkpoint={"every": 1, "keep": 9})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "what the loss counts" in out
    run = run_of(config)
    history = [record for record in read_history(run / "history.jsonl") if record["kind"] == "train"]
    tasks = [set(record["loss_by_task"]) for record in history]
    if by == "every_task":
        assert tasks == [{"caption", "vqa"}] * 6
    elif by == "grouped":
        assert all(len(step) == 1 for step in tasks) and len({tuple(step) for step in tasks}) == 2
    else:
        shares = [record["task_shares"] for record in history]
        assert shares[0] == shares[1] == {"caption": 0.5, "vqa": 0.5}
        assert shares[1] != shares[2] == shares[3] != shares[4] == shares[5]
    whole = trained(run)
    for step in (4, 5, 6):  # the kill comes in the middle of a stretch of two steps
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    assert vlmtune("train", config)[0] == 0
    again = trained(run)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    resumed = [record for record in read_history(run / "history.jsonl") if record["kind"] == "train"]
    assert [r["task_shares"] for r in resumed] == [r["task_shares"] for r in history]
    assert [r["sources"] for r in resumed] == [r["sources"] for r in history]


def test_workers_change_nothing_although_they_prepare_ahead(rows, write_config, vlmtune):
    ends = []
    for workers in (0, 2):
        config = write_config(f"with{workers}", 6, data=sampled_data(rows, SAMPLING["temperature"], workers))
        assert vlmtune("train", config)[0] == 0
        ends.append(trained(run_of(config)))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_composes_with_a_balance_and_accumulation(rows, write_config, vlmtune):
    config = write_config(
        "run", 4, data=sampled_data(rows, SAMPLING["temperature"]), loss={"balance": {"by": "uncertainty"}}
    )
    assert vlmtune("train", config)[0] == 0
    last = read_history(run_of(config) / "history.jsonl")[-1]
    assert set(last["task_shares"]) == set(last["task_weights"]) == {"caption", "vqa"}


@pytest.mark.parametrize(
    ("wish", "source", "complaint"),
    [
        ({"by": "grouped", "temperature": 2}, {}, "temperature means nothing with by: grouped"),
        ({"by": "temperature", "temperature": -1}, {}, "data.sampling.temperature"),
        ({"by": "temperature", "every": 0}, {}, "data.sampling.every"),
        ({"by": "random"}, {}, "data.sampling.by"),
        ({"bye": "grouped", "x": 1}, {}, "unknown key data.sampling.bye (did you mean by?)"),
        ({"by": "every_task"}, {"weight": 2}, "sampling by every_task draws from tasks; leave out the weights"),
    ],
)
def test_sampling_that_cannot_be_is_refused(rows, write_config, vlmtune, wish, source, complaint):
    config = write_config("run", 4, data=sampled_data(rows, wish, **source))
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
    assert not run_of(config).exists()


def test_a_batch_too_small_for_all_tasks_is_refused(rows, write_config, vlmtune):
    config = write_config(
        "run",
        4,
        data=sampled_data(rows, SAMPLING["every_task"]),
        train={"length": 4, "batch_size": 1, "micro_batch_size": 1},
    )
    code, _, err = vlmtune("train", config)
    assert code == 1 and "a batch of 1 cannot hold 2 tasks" in err.replace("\n", " ")

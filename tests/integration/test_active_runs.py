"""data.sampling by: active through `vlmtune train`: drawn, recorded, resumed bit for bit, refused where it must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes_setup import together, train_together
from run_setup import run_of, sampled_data, trained
from safetensors.torch import load_file

from vlmtune.checkpoint import copy_weights
from vlmtune.observe.log import read_history

ACTIVE = {"by": "active", "every": 2, "floor": 0.3}


def train_records(run: Path) -> list[dict]:
    return [record for record in read_history(run / "history.jsonl") if record["kind"] == "train"]


def timeless(records: list[dict]) -> list[dict]:
    return [{key: record[key] for key in ("step", "loss", "task_shares", "sampling", "sources")} for record in records]


def test_a_run_is_drawn_recorded_and_resumed_exactly(rows, write_config, vlmtune):
    """Checkpoints are written in the background: what is in them is of their moment."""
    config = write_config(
        "run", 9, data=sampled_data(rows, ACTIVE), checkpoint={"every": 1, "keep": 9, "background": True}
    )
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    assert "sampling: active by loss, 30 % uniform, new shares every 2 steps; 3.0 draws for each of 12 rows" in out
    run = run_of(config)
    history = train_records(run)
    assert history[0]["sampling"] == history[1]["sampling"] == {}
    told = [record["sampling"] for record in history]
    assert told[1] != told[2] == told[3] != told[4] == told[5] and set(told[2]["difficulty"]) == {"caption", "vqa"}
    assert all(sum(record["task_shares"].values()) == pytest.approx(1) for record in history)
    suspects = [json.loads(line) for line in (run / "suspects.jsonl").read_text().splitlines()]
    assert len(suspects) == told[-1]["suspects"] or "sampling: " in out
    page = (run / "report.html").read_text()
    assert "What sampling shifted to" in page and "Hardest tenth" in page and "Known samples" in page

    stored = load_file(run / "checkpoints" / "step_000005" / "sampling.safetensors")
    assert len(stored["first"]) == 12 and len(stored["rows"]) == 8, "of draws the newest stretch alone"
    whole, losses = trained(run), timeless(history)
    for step in (6, 7, 8, 9):  # the kill comes in the middle of a stretch of two steps
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    assert vlmtune("train", config)[0] == 0
    again = trained(run)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert timeless(train_records(run)) == losses
    (run / "copy").mkdir()
    copy_weights(run / "checkpoints" / "step_000005", run / "copy")
    assert not (run / "copy" / "sampling.safetensors").exists(), "who passes weights on passes no records on"


def test_workers_change_nothing_although_they_prepare_ahead(rows, write_config, vlmtune):
    ends = []
    for workers in (0, 2):
        config = write_config(f"with{workers}", 6, data=sampled_data(rows, ACTIVE, workers))
        assert vlmtune("train", config)[0] == 0
        ends.append(trained(run_of(config)))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_goes_back_draws_what_it_drew(rows, write_config, vlmtune, monkeypatch):
    """What the skipped steps told is forgotten: the records are those of the checkpoint."""
    from vlmtune.data.active import ActiveOrder
    from vlmtune.trainer import Trainer

    heard: list[list[int]] = []
    observe, attempt = ActiveOrder.observe, Trainer.train_step

    def listening(self, losses, samples):
        heard.append([number for number, *_ in samples])
        observe(self, losses, samples)

    def breaking(self, micro_batches):
        from vlmtune.recovery import NonFinite

        if self.state.step == 5 and not self.state.rewinds:
            raise NonFinite("for the test", [])
        return attempt(self, micro_batches)

    monkeypatch.setattr(ActiveOrder, "observe", listening)
    monkeypatch.setattr(Trainer, "train_step", breaking)
    config = write_config(
        "run", 8, data=sampled_data(rows, ACTIVE), checkpoint={"every": 3},
        stability={"nonfinite": "rewind", "spikes": "warn", "limit": 3},
    )  # fmt: skip
    assert vlmtune("train", config)[0] == 0
    expected = [0, 1, 2, 3, 4, 3, 4, 6, 7]  # step 5 is left out when it comes again
    assert [sorted(step) for step in heard] == [list(range(4 * n, 4 * n + 4)) for n in expected]
    last = load_file(run_of(config) / "checkpoints" / "latest" / "sampling.safetensors")
    assert int(last["stretch"].max()) == 3 and torch.isfinite(last["running"]).all()


@pytest.mark.slow  # 20 s: five processes
def test_two_processes_draw_what_one_draws(rows, write_config, tmp_path):
    """Both observe the samples of both, so the shares, which follow losses to float32, are the same; also where each
    holds a part of the model, and fillers, which are no samples, join its micro-batches."""
    told = []
    for size, shard in ((1, False), (2, False), (2, True)):
        name, train = f"of{size}{shard}", {"length": 6, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
        config = write_config(name, 6, data=sampled_data(rows, ACTIVE), train=train | {"log_every": 1, "shard": shard})
        said = train_together(size, tmp_path / f"said{name}", config)
        assert all(isinstance(summary, dict) for summary in said), said
        run = run_of(config)
        latest = load_file(run / "checkpoints" / "latest" / "sampling.safetensors")
        told.append([(r["task_shares"], r["sources"]) for r in train_records(run)])
        told[-1] += [latest["rows"].tolist(), latest["seen"].tolist(), latest["known"].tolist()]
    assert told[0] == told[1] == told[2]


def test_every_process_observes_the_samples_of_all(rows, tmp_path):
    from vlmtune.step import StepLosses

    def work(group):
        own = StepLosses(1.0, {}, {}, {}, [(2 * n + group.rank, 1.5, float("nan")) for n in range(2)])
        told = group.gather("losses", {"losses": vars(own)})
        return [[number for number, *_ in StepLosses.over_all([part["losses"] for part in told]).samples]]

    assert together(2, tmp_path, work) == [[[0, 1, 2, 3]]] * 2


@pytest.mark.parametrize(
    ("wish", "source", "complaint"),
    [
        ({"by": "active", "temperature": 2}, {}, "temperature means nothing with by: active"),
        ({"by": "temperature", "floor": 0.5}, {}, "floor means nothing with by: temperature"),
        ({"measure": "loss"}, {}, "measure means nothing with by: weights"),
        ({"by": "active", "floor": 0}, {}, "data.sampling.floor"),
        ({"by": "active", "measure": "entropy"}, {}, "data.sampling.measure"),
        ({"by": "active"}, {"weight": 2}, "sampling by active draws from rows; leave out the weights of sources"),
    ],
)
def test_options_that_cannot_be_are_refused(wish, source, complaint, rows, write_config, vlmtune):
    config = write_config("run", 4, data=sampled_data(rows, wish, **source))
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
    assert not run_of(config).exists()


def test_a_source_without_end_is_refused_and_one_with_a_limit_is_not(write_config, vlmtune):
    for source, complaint in (
        (
            {"scenes": "base", "task": "vqa"},
            "scenes/base/vqa/train has no end, so no sample of it comes twice; give it",
        ),
        ({"scenes": "base", "task": "vqa", "limit": 6}, ""),
    ):
        sampling = {"by": "active", "every": 2, "measure": "forgetting", "floor": 0.25}
        config = write_config("run", 3, data={"train": [source], "sampling": sampling, "workers": 0})
        code, out, err = vlmtune("train", config)
        assert code == bool(complaint) and complaint in err.replace("\n", " ") and "Traceback" not in err
    assert "sampling: active by forgetting, 25 % uniform, new shares every 2 steps; 2.0 draws for each of 6 rows" in out

"""Memory predicted before the first step, and measured after it, in every run (SPEC C9)."""

from __future__ import annotations

import json

import pytest

from vlmtune.adapt.memory import PeakMeter


def test_every_run_compares_prediction_and_measurement(vlmtune, write_config, tmp_path):
    config = write_config("run", 3)
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert "for this step" in line and "measured" in line and "%)" in line
    assert record["predicted"] > 2**20 and record["highest"] >= record["measured"] > 2**20
    assert sum(record["items"].values()) == record["predicted_later"] >= record["predicted"]
    assert record["items"]["optimizer"] > 0 and 0 < record["image_share"] < 1
    # a model of 1 MB: what libraries take is most of both figures, so this says that the units agree, no more
    assert 0.2 < record["measured"] / record["predicted"] < 5


def test_a_resumed_run_has_its_optimizer_from_the_beginning(vlmtune, write_config, tmp_path):
    keep = {"every": 1, "keep": 4}
    assert vlmtune("train", write_config("run", 4, checkpoint=keep))[0] == 0
    first = json.loads((tmp_path / "run" / "memory.json").read_text())
    for step in ("step_000004", "step_000003"):
        for file in sorted((tmp_path / "run" / "checkpoints" / step).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "run" / "checkpoints" / step).rmdir()
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    assert vlmtune("train", write_config("run", 4, checkpoint=keep))[0] == 0
    again = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert again["predicted"] == first["predicted_later"]


def test_what_cannot_be_predicted_is_said_and_stops_nothing(vlmtune, write_config, tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise NotImplementedError("no such operation without data")

    monkeypatch.setattr("vlmtune.start.predict_step", unknown)
    code, out, err = vlmtune("train", write_config("run", 3))
    assert (code, err) == (0, "")
    assert "memory: not predicted for this model (NotImplementedError: no such operation without data); measured" in out
    assert json.loads((tmp_path / "run" / "memory.json").read_text())["predicted"] is None


def test_a_system_without_the_account(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr("vlmtune.adapt.memory._ACCOUNT", tmp_path / "none")
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    assert meter.peak() is None


@pytest.mark.parametrize("grow", [64, 256])
def test_the_meter_sees_what_is_held_at_once(grow):
    """Two tensors one after the other count once; memory that a model holds counts as given."""
    import torch

    meter = PeakMeter(torch.device("cpu"), held=10 * 2**20)
    meter.start()
    for _ in range(2):
        tensor = torch.ones(grow, 2**18)
        del tensor
    assert meter.peak() == pytest.approx((10 + grow) * 2**20, abs=6 * 2**20)

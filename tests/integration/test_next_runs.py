"""Compute by complexity, active sampling and consistency in one run: they compose, and the run resumes exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from run_setup import final_tensors, numbers
from sizes_of_tests import by_default

from vlmtune.observe.log import read_history


@pytest.mark.parametrize("family", by_default(["llava"], ["llava", "qwen2_5_vl"]))
def test_all_three_in_one_run(family, tiny_folder, write_config, rows, vlmtune, tmp_path):
    data = {
        "train": [{"path": str(rows)}], "workers": 0,
        "complexity": {"measure": "edges", "least": 0.25, "simple": 0.97, "complex": 1.0},
        "sampling": {"by": "active", "every": 2},
    }  # fmt: skip
    wish = {
        "loss": {"consistency": {"weight": 0.5, "margin": 2.0}},
        "data": data,
        "checkpoint": {"every": 3, "keep": 5},
    }
    config = write_config("run", 9, **wish)
    tree = yaml.safe_load(config.read_text()) | {"model": str(tiny_folder(family))}
    config.write_text(yaml.safe_dump(tree))
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, ""), err
    run = Path(tree["run"])
    first, *_, last = [r for r in read_history(run / "history.jsonl") if r["kind"] == "train"]
    assert "complexity (edges)" in out and "sampling: active by loss" in out
    assert first["loss_terms"]["consistency"] > 0 and sum(last["task_shares"].values()) == pytest.approx(1)
    assert set(last["sampling"]) >= {"difficulty", "known", "hardest", "suspects"}
    whole, told = final_tensors(run), [numbers(r) for r in read_history(run / "history.jsonl")]
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    assert vlmtune("train", config)[0] == 0
    again = final_tensors(run)
    assert set(again) == set(whole) and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [numbers(r) for r in read_history(run / "history.jsonl")] == told
    code, _, err = vlmtune("export", run, tmp_path / "exported")
    assert code == 0, err
    assert json.loads((tmp_path / "exported" / "processor_config.json").read_text())["image_processor"][
        "vlmtune_complexity"
    ]["simple"] == 0.97  # fmt: skip

"""Runs with a loss of consistency: what they log, that they resume exactly, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from run_setup import final_tensors

from vlmtune.observe.log import read_history


def test_a_run_logs_it_and_resumes_exactly(write_config, vlmtune):
    """From the middle on, when its weight is above 0; pictures come to matter more."""
    wish = {"consistency": {"weight": [[0, 0], [0.25, 2.0]], "margin": 3.0}}
    config = write_config("run", 12, loss=wish, checkpoint={"every": 4, "keep": 5})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    assert "+ 0, 2 from 25% x consistency: replies likelier with their picture than with one" in " ".join(out.split())
    run = Path(yaml.safe_load(config.read_text())["run"])
    rows = [record for record in read_history(run / "history.jsonl") if record["kind"] == "train"]
    terms = [record["loss_terms"] for record in rows]
    assert terms[:3] == [{}] * 3 and all(set(t) == {"consistency", "consistency/gain"} for t in terms[3:])
    assert terms[-1]["consistency/gain"] > terms[3]["consistency/gain"]
    whole = final_tensors(run)
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    assert vlmtune("train", config)[0] == 0
    again = final_tensors(run)
    assert set(again) == set(whole) and all(torch.equal(whole[name], again[name]) for name in whole)
    code, out, _ = vlmtune("train", config)
    assert code == 0 and "this run has finished already" in out


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"loss": {"consistency": {"tasks": ["grounding"]}}}, "none of the 4 samples of the first step"),
        ({"loss": {"consistency": {}}, "train": {"length": 4, "batch_size": 1}}, "train.batch_size is 1; raise it"),
        ({"loss": {"consistency": {"strength": 1}}}, "unknown key loss.consistency.strength"),
    ],
)
def test_what_cannot_be_is_refused(write_config, vlmtune, sections, complaint):
    config = write_config("run", 4, **sections)
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in " ".join(err.split()) and "Traceback" not in err
    assert not Path(yaml.safe_load(config.read_text())["run"]).exists()

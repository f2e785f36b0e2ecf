"""`vlmtune compare` as a user types it: trials in processes of their own, continued, failed, and refused (SPEC C6)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vlmtune.comparison.trial import score_base
from vlmtune.config import load_config
from vlmtune.evaluate.comparison import Scores
from vlmtune.evaluate.evaluation import mean_loss

STEPS, LONG = 5, 25


@pytest.fixture
def config(write_config, rows) -> Path:
    """A run with held-out data of two tasks."""
    source = {"path": str(rows)}
    return write_config(
        "run", STEPS, data={"train": [source], "eval": {"val": [source | {"limit": 5}]}, "workers": 0},
        evaluate={"batch_size": 8, "max_new_tokens": 4, "every": 2},
    )  # fmt: skip


def test_two_methods_from_start_to_page(vlmtune, config, tmp_path):
    """One comparison of it all, because every trial is a process that loads the libraries."""
    out_folder = tmp_path / "run-compare"
    code, out, err = vlmtune("compare", config, "--methods", "full,lora", "--seeds", 1, "--lr", "lora=1e-3")
    assert (code, err) == (0, ""), out
    assert "lora: language: lora lr=0.001 rank=4 dropout=0.1" in out
    assert "kept from the config: vision frozen, projector full, embed frozen, lm_head frozen" in out
    assert "left out, so that all trials are of one length and only train: evaluate.every" in out
    assert "2 methods x 1 seeds = 2 trials" in out and "one seed: bootstrap over held-out samples" in out

    record = json.loads((out_folder / "compare.json").read_text())
    assert record["baseline"] == "full" and record["waiting"] == [] and record["learning_rates"]["lora"] == 1e-3
    full, lora = record["rows"]
    assert full["trainable"] > lora["trainable"] > 0 and full["failed"] == {}
    assert lora["memory"]["value"] > 0 and lora["memory_ratio"]["value"] > 0 and lora["speed_ratio"]["value"] > 0
    assert lora["loss"]["difference"]["low"] <= lora["loss"]["difference"]["value"]
    for name in ("compare.md", "compare.html", "compare.svg"):
        assert "lora" in (out_folder / name).read_text()

    for arm in ("full", "lora"):  # what a trial says is what its run says, and what `vlmtune eval` says
        run = out_folder / "runs" / f"{arm}-seed0"
        trial = json.loads(run.with_suffix(".json").read_text())["trial"]
        rows = json.loads((run / "assignment.json").read_text())
        assert trial["trainable"] == sum(row["trainable"] for row in rows)
        assert {row["method"] for row in rows if row["part"] == "language"} == {
            f"{arm}" if arm == "full" else "lora r4 α8"
        }
        assert [step["step"] for step in trial["steps"]] == list(range(1, STEPS + 1))
        assert {step["samples"] for step in trial["steps"]} == {4} and trial["steps"][0]["cpu"] is None
        assert all(step["seconds"] > 0 and step["cpu"] > 0 for step in trial["steps"][1:])
        assert trial["peak"] >= json.loads((run / "memory.json").read_text())["measured"]
        code, _, err = vlmtune("eval", run, "--output", tmp_path / f"{arm}.json")
        assert (code, err) == (0, "")
        assert json.loads((tmp_path / f"{arm}.json").read_text()) == pytest.approx(trial["scores"]["metrics"])

    code, _, err = vlmtune("compare", config, "train.seed=0", "optim.clip=0.5", "--methods", "full,lora", "--seeds", 1)
    assert code == 1 and "holds another comparison: full-seed0 differs in optim.clip (1.0 -> 0.5)" in err


@pytest.mark.slow  # four more such processes
def test_a_trial_that_fails_is_said_and_tried_again(vlmtune, config, tmp_path):
    out_folder = tmp_path / "run-compare"
    code, out, err = vlmtune("compare", config, "--methods", "full,lora", "--seeds", 1, "--lr", "lora=1e-3", "--json")
    assert (code, err) == (0, ""), out
    record = json.loads(out)
    before = {path: path.stat().st_mtime_ns for path in (out_folder / "runs").glob("*-seed0.json")}
    code, out, err = vlmtune("compare", config, "--methods", "full,lora,ia3", "--seeds", 1, "--lr", "lora=1e-3",
                             "--lr", "ia3=1e30", "--json")  # fmt: skip
    again = json.loads(out)
    assert code == 1 and {path: path.stat().st_mtime_ns for path in before} == before, "what is finished stays"
    assert again["rows"][:2] == record["rows"]
    (why,) = again["rows"][2]["failed"].values()
    assert "finite" in why and f"- ia3, seed 0, failed: {why}" in (out_folder / "compare.md").read_text()

    code, out, err = vlmtune("compare", config, "--methods", "full,lora,ia3", "--seeds", 1, "--lr", "lora=1e-3",
                             "--lr", "ia3=1e-3", "--json")  # fmt: skip
    assert (code, err) == (0, ""), "what failed is tried again, with other values too"
    assert json.loads(out)["rows"][2]["failed"] == {} and json.loads(out)["rows"][:2] == record["rows"]


def test_values_of_samples_have_the_metrics_as_their_means(config, quiet):
    """Of the base model; by hand from the samples."""
    found = score_base(load_config(str(config)), quiet)
    assert Scores.from_record(json.loads(json.dumps(found.as_record()))) == found
    assert len(found.samples) == 5 and found.metrics["loss"] == pytest.approx(mean_loss(found.samples))
    for name, value in found.metrics.items():
        place, _, metric = name.rpartition("/")
        mine = [sample for sample in found.samples if sample.place == place]
        if name.startswith("loss/"):
            assert value == pytest.approx(mean_loss([s for s in found.samples if f"loss/{s.place}" == name]))
        elif name != "loss":
            assert value == pytest.approx(sum(s.values[metric] for s in mine) / len(mine))
    assert found.score is not None


@pytest.mark.slow  # four processes that load the libraries, after the five of the first test
def test_a_stopped_comparison_continues(config, tmp_path):
    """SIGTERM reaches the trial that is training: it saves, and the same command goes on from there."""
    tree = yaml.safe_load(config.read_text())
    tree["train"]["length"] = LONG
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "vlmtune", "compare", str(config), "--methods", "lora,ia3", "--seeds", "1"]
    run = tmp_path / "run-compare" / "runs" / "lora-seed0"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    end = time.monotonic() + 300
    while not (run / "checkpoints" / "latest").exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM and "the same command continues" in err
    assert not run.with_suffix(".json").exists()
    stopped_at = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["state"]["step"]
    assert 0 < stopped_at < LONG

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"(step {stopped_at})" in " ".join(run.with_suffix(".log").read_text().split())
    trial = json.loads(run.with_suffix(".json").read_text())["trial"]
    assert [step["step"] for step in trial["steps"]] == list(range(1, LONG + 1))
    assert "there is no full among the methods" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "full,lroa"], "'lroa' is neither a method"),
        (["--methods", "lora"], "name two or more"),
        (["--lr", "lora"], "--lr 'lora': write METHOD=RATE"),
        (["--lr", "lora=-1"], "--lr 'lora=-1': write METHOD=RATE"),
        (["--lr", "lora=1e-3", "--lr", "lora=1e-4"], "--lr lora is there twice"),
        (["data.eval={}"], "data.eval is empty"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_file_is_written(vlmtune, config, tmp_path, arguments, said):
    before = sorted(tmp_path.iterdir())
    code, out, err = vlmtune("compare", config, "evaluate.every=null", *arguments)
    assert code == 1 and said in " ".join(err.split()) and sorted(tmp_path.iterdir()) == before, out + err


def test_a_folder_of_somebody_else_is_refused(vlmtune, config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    code, _, err = vlmtune("compare", config, "--methods", "full,lora", "--output", tmp_path / "mine")
    assert code == 1 and "not the folder of a comparison" in " ".join(err.split())

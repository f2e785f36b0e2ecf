"""A chain of three runs: one command, resumed inside any stage to the last bit, one history, one page (SPEC E3, E4)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from test_resume import NULL, fork, numbers
from training_setup import PLAN

from vlmtune.config import load_run_config
from vlmtune.observe.log import read_history
from vlmtune.stages import train_chain

FULL = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 1e-3}]
STEPS = {"align": 4, "tasks": 5, "instruct": 4}


@pytest.fixture
def chain(tiny_folder, rows, tmp_path):
    """`chain("name")` -> the YAML file of a chain of three stages in tmp_path/name."""

    def write(name: str, **top) -> Path:
        source = {"path": str(rows)}
        tree = {
            "model": str(tiny_folder("llava")),
            "run": str(tmp_path / name),
            "data": {"train": [source], "eval": {"val": [source | {"limit": 3}]}, "workers": 0},
            "optim": {"lr": 5e-3, "warmup": 1},
            "train": {"batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
            "checkpoint": {"every": 1},
            "evaluate": {"generate": False},
            "stages": [
                {"name": "align", "plan": FULL, "train": {"length": STEPS["align"]}},
                {"name": "tasks", "plan": FULL, "train": {"length": STEPS["tasks"]}, "data": {"max_length": 256},
                 "loss": {"balance": {"by": "fixed", "weights": {"caption": 0.7, "vqa": 0.3}}}},
                {"name": "instruct", "plan": PLAN, "train": {"length": STEPS["instruct"]}},
            ],
            **top,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def run_quietly(path: Path) -> None:
    with NULL.open("w") as nowhere:
        train_chain(load_run_config(str(path)), Console(file=nowhere))


def result(run: Path) -> dict[str, torch.Tensor]:
    """Exported models of the first two stages and the last checkpoint of the third."""
    files = [*run.glob("*/exported/*.safetensors"), *(run / "3_instruct/checkpoints/latest").rglob("*.safetensors")]
    assert len(files) >= 5
    return {f"{file.relative_to(run)}:{key}": value for file in files for key, value in load_file(file).items()}


def test_killed_in_every_stage_it_ends_as_if_nothing_had_happened(chain, tmp_path):
    """kill -9 at a random moment of each stage and of what lies between; the same results and one joined history."""
    run_quietly(chain("whole"))
    broken = chain("broken")
    rng = random.Random(0)
    kills = 0
    while kills < 12:
        pid = fork(lambda: run_quietly(broken))
        time.sleep(rng.uniform(0.3, 1.2))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    assert kills >= 3, "the chain was too quick to be killed in each stage"
    assert os.waitpid(fork(lambda: run_quietly(broken)), 0)[1] == 0
    expected, got = result(tmp_path / "whole"), result(tmp_path / "broken")
    names = {name.replace("/broken/", "/whole/") for name in got}
    assert names == set(expected)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    histories = [
        [numbers(record) for record in read_history(tmp_path / name / "history.jsonl")] for name in ("whole", "broken")
    ]
    assert histories[0] == histories[1]
    assert not [path for path in (tmp_path / "broken").rglob(".*.tmp")]


def test_one_history_one_summary_one_page(chain, tmp_path, vlmtune):
    """Steps count through; every record has its stage; the page has one curve with a mark for each stage."""
    path = chain("joined")
    code, out, err = vlmtune("train", path)
    assert code == 0, err
    run = tmp_path / "joined"
    records = [r for r in read_history(run / "history.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, sum(STEPS.values()) + 1))
    assert [r["stage"] for r in records] == [name for name, steps in STEPS.items() for _ in range(steps)]
    assert [r["stage_step"] for r in records] == [n + 1 for steps in STEPS.values() for n in range(steps)]
    assert sum(r["sources"]["train.jsonl"] for r in records if r["stage_step"] == STEPS[r["stage"]]) == 4 * 13
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 13 and [stage["status"] for stage in summary["stages"]] == ["finished"] * 3
    loss = summary["metrics"]["val/caption"]["loss"]
    stages = [stage["metrics"]["val/caption"]["loss"] for stage in summary["stages"]]
    assert loss == {"before": stages[0]["before"], "after": stages[-1]["after"]}
    assert all(a["after"] == pytest.approx(b["before"], rel=1e-4) for a, b in zip(stages, stages[1:], strict=False)), (
        "a stage starts where the one before ended (exported in float32)"
    )
    page = (run / "report.html").read_text()
    marks = re.findall(r'<text class="stage"[^>]*>(\w+)<', page)
    assert min(marks.count(stage) for stage in STEPS) >= 3, "in every curve that has its step"
    assert 'href="2_tasks/report.html"' in page and "held-out data after each stage" in out
    shares = json.loads((run / "2_tasks" / "composition.json").read_text())
    assert shares[0]["samples"] == 20 and shares[0]["share"] == 1.0 and shares[0]["rows"] == 12
    assert shares[0]["epochs"] == pytest.approx(20 / 12) and shares[0]["tokens"] > shares[0]["supervised_tokens"] > 0
    assert "what the run reads" in out and (run / "2_tasks" / "report.html").is_file()


def test_a_finished_chain_started_again_trains_nothing(chain, tmp_path, vlmtune):
    path = chain("again")
    assert vlmtune("train", path)[0] == 0
    before = (tmp_path / "again" / "history.jsonl").read_text()
    code, out, _ = vlmtune("train", path)
    assert code == 0 and out.count("is finished") == 3 and "step 1/" not in out
    assert (tmp_path / "again" / "history.jsonl").read_text() == before


def test_commands_take_the_chain_for_its_last_stage(chain, tmp_path, vlmtune, rows):
    path = chain("used")
    assert vlmtune("train", path)[0] == 0
    run = tmp_path / "used"
    code, out, err = vlmtune("eval", run)
    assert code == 0 and "val" in out, err
    assert vlmtune("predict", next(rows.parent.glob("*.png")), "what is it", "--model", run)[0] == 0
    code, out, err = vlmtune("export", run, tmp_path / "model")
    assert code == 0 and "modules merged" in out, err
    assert vlmtune("inspect", path, "stage=tasks", "--html", tmp_path / "page.html")[0] == 0
    code, _, err = vlmtune("inspect", path, "--html", tmp_path / "other.html")
    assert code == 1 and "stage=align" in err


def test_what_cannot_be_merged_is_refused_before_anything_trains(chain, tmp_path, vlmtune):
    path = chain("bottleneck")
    code, _, err = vlmtune(
        "train", path, "stages.0.plan=[{match: vision, train: frozen}, {match: language, train: adapter}, "
        "{match: '*', train: frozen}]",
    )  # fmt: skip
    assert code == 1 and "stage align" in err and "cannot be merged" in err and not (tmp_path / "bottleneck").exists()


def test_another_chain_in_the_folder_is_refused(chain, tmp_path, vlmtune):
    path = chain("same")
    assert vlmtune("train", path)[0] == 0
    code, _, err = vlmtune("train", path, "stages.1.train.length=9")
    assert code == 1 and re.search(r"stage tasks differs: train.length", err)
    code, _, err = vlmtune("train", path, "stages.1.name=other")
    assert code == 1 and "a chain of the stages align, tasks, instruct" in err
    code, out, err = vlmtune("train", path, "stages.1.train.length=3", "--restart")
    assert code == 0, err
    assert json.loads((tmp_path / "same" / "summary.json").read_text())["steps"] == 11


def test_the_doctor_finds_the_stage_that_failed(chain, tmp_path, vlmtune):
    """A learning rate that no float32 survives, in the second stage."""
    path = chain("ill")
    code, _, err = vlmtune(
        "train", path, "stages.1.optim={lr: 1.0e+30, warmup: 0, clip: null}", "stages.1.plan.1.lr=1e+30"
    )
    assert code == 1 and "2_tasks/failures" in err
    code, out, _ = vlmtune("doctor", tmp_path / "ill")
    assert code == 1 and "2_tasks" in out and "cause 1" in out


def test_a_signal_inside_a_stage(chain, tmp_path, vlmtune, monkeypatch):
    """A clean exit with a checkpoint of the stage; the chain goes on in it."""
    from vlmtune.observe.log import History

    before = History.on_step

    def and_signal(self, state, metrics):
        before(self, state, metrics)
        if "2_tasks" in str(self.path) and state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "on_step", and_signal)
    path = chain("signal")
    code, _, err = vlmtune("train", path)
    assert code == 143 and "a checkpoint of step 2 is written" in err
    monkeypatch.setattr(History, "on_step", before)
    code, out, _ = vlmtune("train", path)
    assert code == 0 and "1_align is finished" in out and "(step 2)" in out

"""A chain of three runs: one command, resumed inside any stage to the last bit, one history, one page (SPEC E3, E4)."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run_setup import NULL, fork, numbers
from safetensors.torch import load_file
from training_setup import STAGE_STEPS

from vlmtune import export as export_module
from vlmtune import run as run_module
from vlmtune.checkpoint import latest_checkpoint
from vlmtune.config import load_run_config
from vlmtune.observe.log import History, read_history
from vlmtune.stages import train_chain


def run_quietly(path: Path) -> None:
    with NULL.open("w") as nowhere:
        train_chain(load_run_config(str(path)), Console(file=nowhere))


def result(run: Path) -> dict[str, torch.Tensor]:
    """Exported models of the first two stages and the last checkpoint of the third."""
    files = [*run.glob("*/exported/*.safetensors"), *(run / "3_instruct/checkpoints/latest").rglob("*.safetensors")]
    assert len(files) >= 5
    return {f"{file.relative_to(run)}:{key}": value for file in files for key, value in load_file(file).items()}


def kill_after_record(stage: str, step: int) -> None:
    """In a child process: SIGKILL once `step` of `stage` is in its history and before its checkpoint."""
    before = History.on_step

    def and_die(self, state, metrics):
        before(self, state, metrics)
        if stage in str(self.path) and state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    History.on_step = and_die


def kill_in_export() -> None:
    """In a child process: SIGKILL while the exported model is half-written."""
    before = export_module.save_processor

    def and_die(*arguments):
        before(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    export_module.save_processor = and_die


def kill_in_finish() -> None:
    """In a child process: SIGKILL between the summary of a run and its page."""
    before = run_module.write_page

    def and_die(folder):
        if (folder / "summary.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return before(folder)

    run_module.write_page = and_die


def killed(path: Path, prepare) -> None:
    def work() -> None:
        prepare()
        run_quietly(path)

    status = os.waitpid(fork(work), 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it came past the place of the kill"


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_nothing_had_happened(chain, tmp_path):
    """kill -9 at a seeded step inside each stage, in its last lines and in each export: the same results to the bit."""
    run_quietly(chain("whole"))
    broken, run = chain("broken"), tmp_path / "broken"
    rng = random.Random(0)
    for number, (name, steps) in enumerate(STAGE_STEPS.items(), 1):
        step = rng.randint(2, steps - 1)
        killed(broken, lambda folder=f"{number}_{name}", step=step: kill_after_record(folder, step))
        assert latest_checkpoint(run / f"{number}_{name}" / "checkpoints").name == f"step_{step - 1:06d}"
        killed(broken, kill_in_finish)
        assert (run / f"{number}_{name}" / "summary.json").exists()
        if number < len(STAGE_STEPS):
            killed(broken, kill_in_export)
            assert not (run / f"{number}_{name}" / "exported").exists()
    assert os.waitpid(fork(lambda: run_quietly(broken)), 0)[1] == 0
    expected, got = result(tmp_path / "whole"), result(run)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    histories = [
        [numbers(record) for record in read_history(tmp_path / name / "history.jsonl")] for name in ("whole", "broken")
    ]
    assert histories[0] == histories[1]
    assert not [path for path in run.rglob(".*.tmp")]
    for number, name in enumerate(STAGE_STEPS, 1):
        folder = run / f"{number}_{name}"
        assert (folder / "samples.json").is_file() and "not finished" not in (folder / "report.html").read_text()


def test_one_history_one_summary_one_page(chain, tmp_path, vlmtune):
    """Steps count through; every record has its stage; the page has one curve with a mark for each stage."""
    path = chain("joined")
    code, out, err = vlmtune("train", path)
    assert code == 0, err
    run = tmp_path / "joined"
    records = [r for r in read_history(run / "history.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, sum(STAGE_STEPS.values()) + 1))
    assert [r["stage"] for r in records] == [name for name, steps in STAGE_STEPS.items() for _ in range(steps)]
    assert [r["stage_step"] for r in records] == [n + 1 for steps in STAGE_STEPS.values() for n in range(steps)]
    assert sum(r["sources"]["train.jsonl"] for r in records if r["stage_step"] == STAGE_STEPS[r["stage"]]) == 4 * 13
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
    assert min(marks.count(stage) for stage in STAGE_STEPS) >= 3, "in every curve that has its step"
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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.2.data.train=[{path: nowhere.jsonl}]", "stage instruct: data file nowhere.jsonl does not exist"),
        (
            "stages.2.plan=[{match: visoin, train: frozen}, {match: '*', train: full}]",
            "stage instruct: plan: rule 'visoin'",
        ),
        ("stages.1.optim.warmup=70", "stage tasks: optim.warmup is 70 steps, but the run has only"),
        ("data.new_tokens=[qzx]", "stage tasks: data.new_tokens: stage align added 'qzx' already"),
        ("loss.box={read: head}", "stage tasks: its losses read a box head, and so do those of stage align"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_the_first_trains(chain, tmp_path, vlmtune, override, said):
    code, _, err = vlmtune("train", chain("later"), override)
    assert code == 1 and said in err and not (tmp_path / "later").exists()


def test_a_run_folder_may_be_written_with_a_slash(chain, tmp_path, vlmtune):
    path = chain("slash")
    assert vlmtune("train", path)[0] == 0
    code, out, err = vlmtune("train", path, f"run={tmp_path}/./slash/")
    assert code == 0 and out.count("is finished") == 3, err


@pytest.mark.slow
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
    before = History.on_step

    def and_signal(self, state, metrics):
        before(self, state, metrics)
        if "2_tasks" in str(self.path) and state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "on_step", and_signal)
    path = chain("signal")
    code, _, err = vlmtune("train", path)
    assert code == 143 and "a checkpoint of step 2 is written" in err
    joined = [(r["stage"], r["stage_step"]) for r in read_history(tmp_path / "signal" / "history.jsonl")]
    assert joined[-1] == ("tasks", 2), "what stands beside the stages knows of it too"
    monkeypatch.setattr(History, "on_step", before)
    code, out, _ = vlmtune("train", path)
    assert code == 0 and "1_align is finished" in out and "(step 2)" in out


def test_a_damaged_export_and_a_damaged_list_of_stages_are_one_sentence(chain, tmp_path, vlmtune):
    path = chain("damaged")
    killed(path, lambda: kill_after_record("2_tasks", 2))
    weights = tmp_path / "damaged" / "1_align" / "exported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code, _, err = vlmtune("train", path)
    assert (
        code == 1
        and "1_align/exported' cannot be read" in " ".join(err.split())
        and "deleted and exported again" in err
    )
    shutil.rmtree(weights.parent)
    assert vlmtune("train", path)[0] == 0
    (tmp_path / "damaged" / "stages.json").write_text('[{"name": "al')
    for command in ("doctor", "eval"):
        code, _, err = vlmtune(command, tmp_path / "damaged")
        assert code == 1 and "stages.json is damaged" in err and "start the chain again" in err


def test_a_stage_whose_model_is_not_there_yet(chain, vlmtune):
    code, _, err = vlmtune("train", chain("late"), "stage=tasks")
    assert code == 1 and "train the stage that makes it first" in err

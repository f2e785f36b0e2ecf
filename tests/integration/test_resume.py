"""kill -9 at any moment, start again: the same weights to the last bit, the same history, nothing half-written.

Processes are forked from this one, which has everything imported, so that ten kills cost seconds, not minutes. They end
by a real SIGKILL: no `finally`, no `atexit`, no flush.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from run_setup import final_tensors, fork, numbers, train_quietly, wait_for_step
from training_setup import make_trainer, write_data

from vlmtune import checkpoint as checkpoint_module
from vlmtune.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, read_state
from vlmtune.config import load_config
from vlmtune.observe.log import read_history
from vlmtune.types import VlmtuneError


@pytest.mark.slow  # eleven processes that load the libraries
def test_ten_kills_in_one_run(write_config):
    """Kill at ten random moments of one run of 40 steps that saves at every step; then let it end."""
    steps, kills = 40, 10
    whole = load_config(str(write_config("whole", steps))).run
    summary = train_quietly(write_config("whole", steps))
    step_seconds = summary["train_seconds"] / steps
    config = write_config("killed", steps)
    run = Path(load_config(str(config)).run)

    rng = random.Random(0)
    survived: list[int] = []
    for _ in range(kills):
        reached = survived[-1] if survived else 0
        pid = fork(lambda: train_quietly(config))
        wait_for_step(run, reached + 1, pid)
        time.sleep(rng.uniform(0, 2 * step_seconds))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        survived.append(read_state(latest_checkpoint(run / "checkpoints"))["state"]["step"])
    assert survived == sorted(set(survived)) and survived[-1] < steps, survived

    pid = fork(lambda: train_quietly(config))
    assert os.waitpid(pid, 0)[1] == 0
    expected, got = final_tensors(Path(whole)), final_tensors(run)
    assert set(expected) == set(got) and len(expected) > 100
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []

    history, reference = read_history(run / "history.jsonl"), read_history(Path(whole) / "history.jsonl")
    assert [record["step"] for record in history] == list(range(1, steps + 1))
    assert [numbers(record) for record in history] == [numbers(record) for record in reference]
    assert json.loads((run / "summary.json").read_text())["samples"] == 4 * steps
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000039", "step_000040"]


def test_a_finished_run_started_again_changes_nothing(write_config, rows):
    """Nothing trains, and history does not hold the last evaluation twice."""
    held_out = {"val": [{"path": str(rows), "limit": 2}]}
    data = {"train": [{"path": str(rows)}], "eval": held_out, "workers": 0}
    config = write_config("twice", 3, data=data, evaluate={"every": 2, "generate": False})
    run = Path(load_config(str(config)).run)
    first = train_quietly(config)
    history, tensors = read_history(run / "history.jsonl"), final_tensors(run)
    assert [(r["kind"], r["step"]) for r in history] == [
        ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3),
    ]  # fmt: skip
    again = train_quietly(config)
    assert read_history(run / "history.jsonl") == history
    assert all(torch.equal(value, tensors[name]) for name, value in final_tensors(run).items())
    assert again["metrics"] == first["metrics"] and again["steps"] == 3


# ---- one save, interrupted everywhere ---------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_folder, tmp_path):
    """A trainer after 2 steps with checkpoints of both."""
    setup = make_trainer(
        tiny_folder("llava"), write_data(tmp_path / "data", 8), tmp_path / "checkpoints", total_steps=2,
        checkpoint_every=1,
    )  # fmt: skip
    setup.trainer.fit()
    return setup


def die_before(call: int, monkeypatch) -> None:
    """SIGKILL this process before the `call`-th file operation of the checkpoint module."""
    left = [call]

    def counted(function):
        def operation(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return operation

    for name in ("lay_out", "fill_in", "save_file", "save_adapters", "sync", "digests", "remove_checkpoint"):
        monkeypatch.setattr(checkpoint_module, name, counted(getattr(checkpoint_module, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "unlink", counted(os.unlink))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    monkeypatch.setattr(Path, "symlink_to", counted(Path.symlink_to))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="a new step, the oldest is deleted"),
        pytest.param(2, id="a step that is there is replaced", marks=pytest.mark.slow),
    ],
)
def test_killed_before_each_file_operation_of_a_save(step, saved, monkeypatch, tmp_path):
    """Whatever the moment, the newest checkpoint is whole: it loads, and the next save works and leaves no litter."""
    trainer, folder = saved.trainer, tmp_path / "checkpoints"
    monkeypatch.setattr(checkpoint_module, "sync", lambda path: None)  # what is written survives a kill without it
    shutil.copytree(folder, tmp_path / "pristine", symlinks=True)
    deaths = 0
    for call in range(200):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "pristine", folder, symlinks=True)

        def save(call: int = call) -> None:
            die_before(call, monkeypatch)
            trainer.state.step = step
            trainer.save()

        status = os.waitpid(fork(save), 0)[1]
        newest = latest_checkpoint(folder)
        state = load_checkpoint(
            newest, saved.model, saved.plan, trainer.optimizer, "fingerprint", saved.trainer.module.objective
        )
        assert state.step == int(newest.name.removeprefix("step_"))
        assert all(read_state(complete) for complete in checkpoints(folder))
        if status == 0:
            break
        assert status == signal.SIGKILL
        deaths += 1
        trainer.resume(newest)
        assert (folder / "latest").resolve() == newest.resolve(), "written, but not named before the kill"
        if deaths % 3:  # what follows takes the longest
            continue
        trainer.fit()  # nothing is left to train: it only tidies up
        trainer.state.step = step
        trainer.save()
        assert [p.name for p in folder.iterdir() if p.name.startswith(".step")] == []
        assert (folder / "latest").resolve().name == f"step_{step:06d}"
    assert status == 0 and deaths > 15, f"{deaths} deaths"


def test_killed_between_writing_the_best_checkpoint_and_naming_it(saved, tmp_path):
    """Its state says that it is the best: the resume gives it the name, which export asks for."""
    trainer, folder = saved.trainer, tmp_path / "checkpoints"
    trainer.state.best, trainer.state.best_step = 0.5, 2
    trainer.save()
    assert not (folder / "best").exists()
    trainer.resume(folder / "step_000002")
    assert (folder / "best").resolve().name == "step_000002"
    trainer.resume(folder / "step_000001")
    assert (folder / "best").resolve().name == "step_000002", "the older one never was the best"


# ---- damage -----------------------------------------------------------------------------------------------------


FILES = (
    "trained.safetensors", "optimizer.safetensors", "state.json", "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "one bit", "deleted", "empty"])
def test_a_damaged_file_is_refused_by_name(name, damage, saved, tmp_path):
    """Every file of a checkpoint; the model and the optimizer are untouched by the attempt."""
    folder = tmp_path / "checkpoints" / "step_000002"
    path = folder / name
    content = path.read_bytes()
    weights = {key: value.clone() for key, value in saved.model.state_dict().items()}
    for position in {len(content) // 3, len(content) // 2, len(content) - 2}:
        if damage == "truncated":
            path.write_bytes(content[:position])
        elif damage == "one bit":
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        elif damage == "deleted":
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(b"")
        with pytest.raises(VlmtuneError) as caught:
            load_checkpoint(
                folder, saved.model, saved.plan, saved.trainer.optimizer, "fingerprint", saved.trainer.module.objective
            )
        assert name in str(caught.value) and str(folder) in str(caught.value)
    assert all(torch.equal(value, weights[key]) for key, value in saved.model.state_dict().items())
    path.write_bytes(content)
    assert (
        load_checkpoint(
            folder, saved.model, saved.plan, saved.trainer.optimizer, "fingerprint", saved.trainer.module.objective
        ).step
        == 2
    )


def test_every_bit_of_the_state_is_covered(saved, tmp_path):
    """state.json vouches for the other files, so nothing in it may change unseen: any digit, letter or quote."""
    folder = tmp_path / "checkpoints" / "step_000002"
    path = folder / "state.json"
    content = path.read_bytes()
    rng = random.Random(0)
    visible = [n for n, byte in enumerate(content) if not chr(byte).isspace()]
    for position in rng.sample(visible, 300):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(VlmtuneError, match=r"state\.json"):
            read_state(folder)


def test_another_config_is_refused(saved, tmp_path):
    with pytest.raises(VlmtuneError, match="another config"):
        load_checkpoint(
            tmp_path / "checkpoints" / "latest",
            saved.model,
            saved.plan,
            saved.trainer.optimizer,
            "another fingerprint",
            saved.trainer.module.objective,
        )

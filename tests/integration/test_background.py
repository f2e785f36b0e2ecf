"""Checkpoints written while training goes on: the same files as otherwise, however long the disk takes."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from processes_setup import together
from safetensors.torch import load_file
from training_setup import full_rules, make_trainer, write_data

from vlmtune import checkpoint as checkpoint_module
from vlmtune.checkpoint import checkpoints, read_state
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.observer import Observer
from vlmtune.types import VlmtuneError

STEPS = 6


@pytest.fixture
def make(tiny_folder, tmp_path):
    data = write_data(tmp_path / "data", 12)

    def trainer(name: str, **how):
        return make_trainer(
            tiny_folder("llava"), data, tmp_path / name, full_rules, STEPS, **{"checkpoint_every": 2, "keep": 9} | how
        ).trainer

    return trainer


class Steps(Observer):
    """Calls something after every step."""

    def __init__(self, after):
        self.after = after

    def on_step(self, state, metrics):
        self.after(state.step)


def named(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    names = ("trained.safetensors", "optimizer.safetensors")
    return {f"{name}/{key}": value for name in names for key, value in load_file(folder / name).items()}


def test_training_goes_on_and_the_files_are_those_of_their_step(make, tmp_path, monkeypatch):
    """The disk does not finish the checkpoint of step 2 before step 3 is made."""
    make("foreground").fit()
    own, may_write, seen = checkpoint_module.fill_in, threading.Event(), []
    monkeypatch.setattr(checkpoint_module, "fill_in", lambda *args: may_write.wait(60) and own(*args))

    def after(step: int) -> None:
        seen.append((step, named(tmp_path / "background")))
        if step == 3:
            may_write.set()

    trainer = make("background", background=True, observers=[Steps(after)])
    trainer.fit()
    assert seen[2] == (3, []), "three steps were made without a checkpoint"
    assert named(tmp_path / "background") == named(tmp_path / "foreground") == [f"step_{n:06d}" for n in (2, 4, 6)]
    assert (tmp_path / "background" / "latest").resolve().name == "step_000006"
    for name in named(tmp_path / "foreground"):
        one, other = tensors_of(tmp_path / "foreground" / name), tensors_of(tmp_path / "background" / name)
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
        of = [read_state(tmp_path / where / name) for where in ("foreground", "background")]
        assert of[0]["state"]["samples"] == of[1]["state"]["samples"] and of[0]["rng"] == of[1]["rng"]


def test_a_signal_waits_for_what_is_under_way(make, tmp_path, monkeypatch):
    own = checkpoint_module.fill_in
    monkeypatch.setattr(checkpoint_module, "fill_in", lambda *args: (threading.Event().wait(0.2), own(*args)))
    stop = StopRequest()

    def after(step: int) -> None:
        if step == 3:
            stop.number = 15

    trainer = make("run", background=True, observers=[Steps(after)], parts={"stop": stop})
    with pytest.raises(Interrupted, match="a checkpoint of step 3 is written"):
        trainer.fit()
    assert named(tmp_path / "run") == ["step_000002", "step_000003"]
    assert (tmp_path / "run" / "latest").resolve().name == "step_000003"


def test_a_full_disk_ends_the_run_and_spares_what_was_there(make, tmp_path, monkeypatch):
    own = checkpoint_module.fill_in

    def fill_in(path, *args):
        if "step_000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        own(path, *args)

    monkeypatch.setattr(checkpoint_module, "fill_in", fill_in)
    with pytest.raises(VlmtuneError, match="step_000004 could not be written .* free some space"):
        make("run", background=True).fit()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_000002"]


def test_processes_that_hold_parts_write_theirs(make, tmp_path):
    make("one").fit()

    def work(group):
        make("two", background=True, holders=group).fit()
        return named(tmp_path / "two")

    assert together(2, tmp_path / "store", work) == [named(tmp_path / "one")] * 2
    one, two = (tensors_of(tmp_path / name / "step_000006") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3, msg=key)

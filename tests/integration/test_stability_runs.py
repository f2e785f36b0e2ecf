"""What threatens a long run, by the command line: signals, damaged checkpoints, full disks, NaN (SPEC D7, D8, F5)."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from run_setup import final_tensors, fork, numbers, train_quietly
from safetensors.torch import load_file, save_file

from vlmtune import cli
from vlmtune.checkpoint import latest_checkpoint, read_state
from vlmtune.config import load_config
from vlmtune.observe.log import History, read_history
from vlmtune.paths import alone_in


def run_of(config: Path) -> Path:
    return Path(load_config(str(config)).run)


def train_as_command(config: Path) -> None:
    """In a child: as `vlmtune train` does it, with its exit code."""
    import sys

    sys.argv = ["vlmtune", "train", str(config)]
    with open(os.devnull, "w") as nowhere:
        cli.console.file = cli.errors.file = nowhere
        try:
            cli.main()
        except SystemExit as stop:
            os._exit(stop.code or 0)


# ---- signals -----------------------------------------------------------------------------------------------------


def test_sigterm_at_random_moments_of_one_run(write_config):
    """Eight times, while it loads, trains, saves: a clean exit with a checkpoint of that step, and at the end the
    weights and the history of a run that nobody disturbed, to the last bit."""
    steps = 30
    whole = write_config("whole", steps, checkpoint={"every": 7})
    summary = train_quietly(whole)
    config = write_config("stopped", steps, checkpoint={"every": 7})
    rng = random.Random(1)
    reached = 0
    for turn in range(8):
        pid = fork(lambda: train_as_command(config))
        if turn % 4:
            wait_for_history(run_of(config), reached + 1, pid)
            time.sleep(rng.uniform(0, 2 * summary["train_seconds"] / steps))
        else:
            time.sleep(rng.uniform(0, 0.5))  # while it loads
        os.kill(pid, rng.choice((signal.SIGTERM, signal.SIGINT)))
        status = os.waitpid(pid, 0)[1]
        newest = latest_checkpoint(run_of(config) / "checkpoints")
        if os.WIFSIGNALED(status):  # before Python had its handlers
            assert turn % 4 == 0
        else:
            assert os.WEXITSTATUS(status) in (130, 143)
            now = read_state(newest)["state"]["step"] if newest else 0
            assert now >= reached + (turn % 4 > 0), "what was trained before the signal is in the checkpoint"
            reached = now
        assert not newest or not [p for p in newest.parent.iterdir() if p.name.startswith(".")]
    assert 0 < reached < steps
    assert os.waitpid(fork(lambda: train_as_command(config)), 0)[1] == 0
    expected, got = final_tensors(run_of(whole)), final_tensors(run_of(config))
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    history, reference = (read_history(run_of(c) / "history.jsonl") for c in (config, whole))
    assert [numbers(record) for record in history] == [numbers(record) for record in reference]


def wait_for_history(run: Path, step: int, pid: int) -> None:
    for _ in range(6000):
        if any(record["step"] >= step for record in read_history(run / "history.jsonl")):
            return
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"the child ended before step {step}"
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within 30 s")


def test_what_a_stopped_run_says(write_config, vlmtune, monkeypatch):
    """One line, exit code 143, and the same command continues."""
    from vlmtune.observe.log import History

    config = write_config("said", 6)
    before = History.on_step

    def and_signal(self, state, metrics):
        before(self, state, metrics)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "on_step", and_signal)
    code, _, err = vlmtune("train", config)
    assert code == 143
    assert err.strip() == "stopped by SIGTERM; the same command continues; a checkpoint of step 2 is written."
    monkeypatch.setattr(History, "on_step", before)
    code, out, _ = vlmtune("train", config)
    assert code == 0 and "(step 2)" in out and "trained 6 steps" in out


# ---- damaged checkpoints -----------------------------------------------------------------------------------------


FILES = (
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "gradients.jsonl", "history.jsonl",
    "optimizer.safetensors", "plan.json", "probe.safetensors", "state.json", "trained.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A run of 4 steps with checkpoints of the last three, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    rows, tiny = request.getfixturevalue("rows"), request.getfixturevalue("tiny_folder")
    from training_setup import PLAN

    tree = {
        "model": str(tiny("llava")), "run": str(folder / "run"), "data": {"train": [{"path": str(rows)}], "workers": 0},
        "plan": PLAN, "stability": {"statistics": "1 steps"},
        "train": {"length": 4, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
        "checkpoint": {"every": 1, "keep": 3},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    train_quietly(folder / "run.yaml")
    return folder


def test_the_list_of_files_is_whole(finished):
    newest = latest_checkpoint(finished / "run" / "checkpoints")
    assert tuple(sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, damage, finished, tmp_path, vlmtune):
    """Every file in turn. The run continues from step 3, ends with the same weights, and nothing was thrown away."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    path = run / "checkpoints" / "step_000004" / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[:middle] if damage == "truncated" else flipped)
    code, out, err = vlmtune("train", finished / "run.yaml", f"run={run}")
    assert code == 0, err
    warning = next(line for line in out.splitlines() if line.startswith("warning"))
    assert name in warning and "step_000003 is used" in warning
    assert "(step 3)" in out and (run / "checkpoints" / "damaged_step_000004" / name).is_file()
    expected, got = final_tensors(finished / "run"), final_tensors(run)
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_where_every_checkpoint_is_damaged_nothing_starts_over_by_itself(finished, tmp_path, vlmtune):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    for path in (run / "checkpoints").glob("step_*/state.json"):
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = vlmtune("train", finished / "run.yaml", f"run={run}")
    assert code == 1 and "state.json" in err and "--restart" in err
    assert len(list((run / "checkpoints").glob("step_*"))) == 3


def test_a_checkpoint_is_measured_on_load(finished, tmp_path, vlmtune):
    """The same file names and digests, other weights: as after a renamed key that loads without a complaint."""
    import hashlib

    from vlmtune.sealed import seal

    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    folder = run / "checkpoints" / "step_000004"
    tensors = {name: value * 3 + 1 for name, value in load_file(folder / "trained.safetensors").items()}
    save_file(tensors, folder / "trained.safetensors", {"format": "pt"})
    described = json.loads((folder / "state.json").read_text())
    described["files"]["trained.safetensors"] = hashlib.sha256(
        (folder / "trained.safetensors").read_bytes()
    ).hexdigest()
    del described["checksum"]
    (folder / "state.json").write_text(seal(described))
    code, _, err = vlmtune("train", finished / "run.yaml", f"run={run}")
    assert code == 1 and "its three stored samples had the losses" in err and "transformers" in err


def test_a_deleted_history_comes_back_from_the_checkpoint(finished, tmp_path, vlmtune):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    (run / "history.jsonl").unlink()
    assert vlmtune("train", finished / "run.yaml", f"run={run}")[0] == 0
    assert read_history(run / "history.jsonl") == read_history(finished / "run" / "history.jsonl")


# ---- disks -------------------------------------------------------------------------------------------------------


def test_checkpoints_that_cannot_fit_are_refused_before_the_start(write_config, vlmtune, monkeypatch, tmp_path):
    config = write_config("full", 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    code, _, err = vlmtune("train", config)
    assert code == 1 and re.search(r"4|3 checkpoints of \d+ MiB need", err) and "checkpoint.keep" in err
    assert not (tmp_path / "full").exists(), "nothing was written"


def test_the_estimate_is_what_a_checkpoint_takes(finished, vlmtune, tmp_path):
    """Within 15 %: the rest is names, JSON and the stored samples, which a tiny model does not dwarf."""
    _, out, _ = vlmtune("train", finished / "run.yaml", f"run={tmp_path / 'run'}")
    said = float(re.search(r"checkpoints: about ([\d.]+) MiB", out).group(1))
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    tensors = sum(p.stat().st_size for p in newest.rglob("*.safetensors") if p.name != "probe.safetensors")
    assert said == pytest.approx(tensors / 2**20, rel=0.15)


def test_a_write_that_fails_keeps_the_run(write_config, vlmtune):
    """A quota on the size of files, met in the third step: the second checkpoint is whole, and the run goes on."""
    config = write_config("quota", 5)
    run = run_of(config)

    def limited() -> None:
        before = History.on_step

        def and_limit(self, state, metrics):
            before(self, state, metrics)
            if state.step == 3:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        History.on_step = and_limit
        train_as_command(config)

    status = os.waitpid(fork(limited), 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1
    newest = latest_checkpoint(run / "checkpoints")
    assert newest.name == "step_000002"
    assert [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".step")] == []
    code, out, _ = vlmtune("train", config)
    assert code == 0 and "(step 2)" in out


def test_two_processes_do_not_train_in_one_folder(write_config, tmp_path, vlmtune):
    """The second says who is there; once the first has gone, by whatever signal, it may."""
    config = write_config("shared", 3)
    ready, report = os.pipe()

    def hold() -> None:
        with alone_in(run_of(config)):
            os.write(report, b"!")
            time.sleep(600)

    pid = fork(hold)
    os.read(ready, 1)
    code, _, err = vlmtune("train", config)
    assert code == 1 and f"another process ({pid} on " in err and not run_of(config).exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert vlmtune("train", config)[0] == 0


def test_a_stop_of_a_restarted_run_says_how_to_go_on(write_config, vlmtune, monkeypatch):
    before = History.on_step

    def and_stop(self, state, metrics):
        before(self, state, metrics)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "on_step", and_stop)
    code, _, err = vlmtune("train", write_config("again", 4), "--restart")
    assert code == 143 and "the same command without --restart continues" in err


def test_a_loss_that_is_not_finite_is_null_in_files_for_any_reader(write_config, rows, vlmtune, monkeypatch):
    """The table shows nan; JSON has no word for it."""
    held_out = {"train": [{"path": str(rows)}], "eval": {"v": [{"path": str(rows), "limit": 2}]}, "workers": 0}
    config = write_config("nan", 2, data=held_out, optim={"lr": 1e-3, "warmup": 1}, evaluate={"generate": False})
    losses = "vlmtune.evaluate.evaluation.token_cross_entropy"
    monkeypatch.setattr(losses, lambda hidden, head, targets: torch.full(targets.shape, math.nan))
    assert vlmtune("train", config)[0] == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for name in ("summary.json", "before.json", "history.jsonl"):
        text = (run_of(config) / name).read_text()
        for part in text.splitlines() if name == "history.jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    summary = json.loads((run_of(config) / "summary.json").read_text())
    assert summary["metrics"]["v/vqa"]["loss"] == {"before": None, "after": None}


def test_a_damaged_file_from_before_training_is_said_at_the_start(write_config, rows, vlmtune, monkeypatch):
    held_out = {"train": [{"path": str(rows)}], "eval": {"v": [{"path": str(rows), "limit": 2}]}, "workers": 0}
    config = write_config("before", 2, data=held_out, optim={"lr": 1e-3, "warmup": 1}, evaluate={"generate": False})
    assert vlmtune("train", config)[0] == 0
    (run_of(config) / "before.json").write_text("{")
    monkeypatch.setattr("vlmtune.run.prepare", lambda *arguments: pytest.fail("too late"))
    code, _, err = vlmtune("train", config)
    assert code == 1 and "before.json is damaged" in err and "delete it" in err


def test_more_than_the_memory_is_one_sentence(write_config, vlmtune, monkeypatch):
    def refuse(*arguments, **named):
        raise MemoryError("Unable to allocate 59.6 GiB")

    monkeypatch.setattr("vlmtune.run.prepare", refuse)
    code, _, err = vlmtune("train", write_config("huge", 10**9))
    assert code == 1 and "Unable to allocate 59.6 GiB" in err and "train.length" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB; skips where one cannot be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m tmpfs {place} 2>/dev/null"):
        pytest.skip("mounting a small file system needs privileges")
    yield place
    os.system(f"umount {place}")


def test_a_disk_that_fills_up(small_disk, write_config, vlmtune, monkeypatch):
    """The estimate is switched off, so that the disk fills in the middle: one sentence, the last checkpoint whole, and
    with space the run goes on."""
    config = write_config("unused", 6, checkpoint={"every": 1, "keep": 1})
    run = small_disk / "run"
    monkeypatch.setattr("vlmtune.run.require_disk", lambda *arguments: None)
    monkeypatch.setattr("vlmtune.observe.log.TensorBoard._open", lambda self, purge_step: None)
    from vlmtune.observe.log import History, TensorBoard

    for name in ("on_step", "close"):
        monkeypatch.setattr(TensorBoard, name, lambda *arguments: None)
    before = History.on_step

    def and_fill(self, state, metrics):
        before(self, state, metrics)
        if state.step == 3:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "other").write_bytes(b"x" * max(0, free - 50_000))

    monkeypatch.setattr(History, "on_step", and_fill)
    code, _, err = vlmtune("train", config, f"run={run}")
    assert code == 1 and "step_000003 could not be written" in err and "step_000002 is whole" in err
    assert "free some space" in err
    (small_disk / "other").unlink()
    monkeypatch.setattr(History, "on_step", before)
    code, out, err = vlmtune("train", config, f"run={run}")
    assert code == 0 and "(step 2)" in out, err


# ---- NaN ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_nan_stops_the_run_and_is_named(write_config, tiny_folder, vlmtune, tmp_path):
    """A base model with one broken tensor; the diagnosis names it, the batch is kept, and the exit code is 1."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder("llava"), broken)
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if "layers.1.mlp.up_proj.weight" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    config = write_config("nan", 3, model=str(broken))
    code, _, err = vlmtune("train", config)
    assert code == 1 and "not finite" in err and "layers.1" in err, err


def test_config_policies_reach_the_run(write_config, vlmtune, monkeypatch):
    """stability.nonfinite: skip through the command line: the run ends, the failure lies in failures/, counted."""
    from vlmtune.data import loader

    collate = loader.collate

    def poison(encoded, pad):
        batch = collate(encoded, pad)
        if "s7" in batch.sample_ids and "pixel_values" in batch.inputs:
            batch.inputs["pixel_values"] = batch.inputs["pixel_values"] * float("nan")
        return batch

    monkeypatch.setattr(loader, "collate", poison)
    config = write_config("skip", 6, stability={"nonfinite": "skip"})
    code, out, err = vlmtune("train", config)
    assert code == 0, err
    found = [r for r in read_history(run_of(config) / "history.jsonl") if r["kind"] == "finding"]
    assert found and all("s7" in record["evidence"] for record in found)
    assert json.loads((run_of(config) / "summary.json").read_text())["skipped"] == [r["step"] for r in found]
    assert sorted(p.name for p in (run_of(config) / "failures").iterdir()) == [
        f"step_{r['step'] + 1:06d}" for r in found
    ]

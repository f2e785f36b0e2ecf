"""Several processes through `run.train` and the command: one run folder, errors in all, killed and continued."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from processes_setup import fork_group, said_by, together, train_together, training, wait_for_all
from rich.console import Console
from run_setup import final_tensors, numbers, train_quietly, wait_for_step
from sizes_of_tests import by_default
from training_setup import write_data

from vlmtune.checkpoint import latest_checkpoint, read_state
from vlmtune.config import Chain, load_config, load_run_config
from vlmtune.data.sources import FileSource
from vlmtune.prepare import prepare
from vlmtune.shards import is_sharded
from vlmtune.stages import train_chain
from vlmtune.start import held_bytes
from vlmtune.step import StepShare
from vlmtune.types import VlmtuneError

STEPS = 6
WITHOUT_DROPOUT = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full"},
    {"match": "language", "train": "lora", "rank": 4},
    {"match": "*", "train": "frozen"},
]
MIXED = [
    {"match": "vision", "train": "frozen"},
    {"match": "language.layers[0:1]", "train": "full"},
    {"match": "language", "train": "lora", "rank": 4},
    {"match": "*", "train": "full"},
]


def in_parts(config: Path) -> Path:
    """The same run, in which every process holds a part of the model."""
    tree = yaml.safe_load(config.read_text())
    tree["train"]["shard"] = True
    path = config.with_name(f"parts_{config.name}")
    path.write_text(yaml.safe_dump(tree))
    return path


def history(run: Path) -> list[dict]:
    return [numbers(json.loads(line)) for line in (run / "history.jsonl").read_text().splitlines()]


def test_a_run_of_two_is_the_run_of_one(write_config, rows, tmp_path):
    """One folder, written by the first; evaluations, checkpoints and history as of one process."""
    parts = {
        "plan": WITHOUT_DROPOUT,
        "optim": {"lr": 1e-2, "warmup": 2, "eps": 1e-2},
        "data": {"train": [{"path": str(rows)}], "eval": {"val": [{"path": str(rows), "limit": 3}]}, "workers": 1},
        "evaluate": {"every": 3, "generate": False},
    }
    one = train_quietly(write_config("one", STEPS, **parts))
    summaries = train_together(2, tmp_path / "store", write_config("two", STEPS, **parts))
    for summary in summaries:
        assert summary["metrics"].keys() == one["metrics"].keys() and summary["steps"] == one["steps"] == STEPS
    first, second = tmp_path / "one", tmp_path / "two"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert len(history(first)) == len(history(second))
    for line, other in zip(history(first), history(second), strict=True):
        assert line.keys() == other.keys()
        if line["kind"] == "train":
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
            assert other["samples"] == line["samples"] and other["task_weights"] == line["task_weights"]
    one, two = final_tensors(first), final_tensors(second)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("of_two", "of_four"),
    [
        pytest.param(in_parts, in_parts, id="in parts"),
        pytest.param(Path, Path, id="whole", marks=pytest.mark.slow),
        pytest.param(in_parts, Path, id="in parts, then whole", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_continues(of_two, of_four, write_config, tmp_path):
    """2 -> 1 -> 4: what a checkpoint holds does not depend on how many wrote it, nor on who held what."""
    parts = {"plan": MIXED, "optim": {"lr": 1e-2, "warmup": 2, "eps": 1e-2}}
    train_quietly(write_config("whole", STEPS, **parts))
    config = write_config("parted", STEPS, **parts)
    children = fork_group(2, tmp_path / "a", training(of_two(config)))
    wait_for_step(tmp_path / "parted", 2, children[0])
    for child in children:
        os.kill(child, signal.SIGTERM)
    wait_for_all(children)
    assert all("stopped by SIGTERM" in text for text in said_by(2, tmp_path / "a"))
    child = fork_group(1, tmp_path / "b", training(config))
    wait_for_step(tmp_path / "parted", 4, child[0])
    os.kill(child[0], signal.SIGTERM)
    wait_for_all(child)
    assert "stopped by SIGTERM" in said_by(1, tmp_path / "b")[0]
    (summary, *_) = train_together(4, tmp_path / "c", of_four(config))
    assert summary["steps"] == STEPS
    whole, parted = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parted")
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "times", [pytest.param(1, id="once"), pytest.param(10, id="ten times", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("held", by_default([in_parts], [Path, in_parts]))
def test_killed_again_and_again_it_ends_with_the_same_weights(held, times, write_config, tmp_path):
    """kill -9 of one of two processes at random moments. The other ends with a sentence; the same command goes on."""
    steps = STEPS * times
    train_together(2, tmp_path / "store", held(write_config("whole", steps, plan=MIXED)))
    config, generator = held(write_config("killed", steps, plan=MIXED)), random.Random(0)
    for number in range(times):
        store = tmp_path / f"store{number}"
        newest = latest_checkpoint(tmp_path / "killed" / "checkpoints")
        children = fork_group(2, store, training(config), patience=5.0)
        done = 0 if newest is None else int(newest.name.removeprefix("step_"))
        wait_for_step(tmp_path / "killed", done + 1, children[0])
        time.sleep(generator.random() / 10)
        victim = generator.randrange(2)
        os.kill(children[victim], signal.SIGKILL)
        codes = wait_for_all(children)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
        said = said_by(2, store)[1 - victim]
        assert f"error: rank {1 - victim} at " in said and f"rank {victim} on " in said
    train_together(2, tmp_path / "last", config)
    whole, killed = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "killed")
    assert all(torch.equal(killed[name], value) for name, value in whole.items()), "dropout included"


def test_one_signal_stops_all_after_the_same_step(write_config, tmp_path):
    config = write_config("asked", 200)
    children = fork_group(2, tmp_path / "store", training(config))
    wait_for_step(tmp_path / "asked", 2, children[0])
    os.kill(children[1], signal.SIGTERM)
    wait_for_all(children)
    said = said_by(2, tmp_path / "store")
    assert said[0] == said[1] and "stopped by SIGTERM" in said[0] and "a checkpoint of step" in said[0]


# ---- what cannot go well: a sentence in every process ----------------------------------------------------------------


def test_another_config_is_refused(write_config, tmp_path):
    one = write_config("run", STEPS)
    text = one.read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("lr: 0.01", "lr: 0.02"))
    for said in train_together(2, tmp_path / "store", one, other):
        assert said.startswith(
            "error: rank 1 was started with something else than rank 0: config.optim.lr (0.01 -> 0.02)"
        )
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused(write_config, tmp_path):
    """A machine with another file under the same name: here, one process that reads other bytes."""
    rows = write_data(tmp_path / "own", 12)
    config = write_config("run", STEPS, data={"train": [{"path": str(rows)}], "workers": 0})
    own = FileSource.__getitem__

    def reads_otherwise(group):
        if group.rank == 1:
            FileSource.__getitem__ = lambda source, row: replace(own(source, row), task="another")

    for said in train_together(2, tmp_path / "store", config, before=reads_otherwise):
        assert said.startswith("error: rank 1 is not about to do what rank 0 does: data (rows, digest).train.jsonl (")


def test_more_processes_than_samples_are_refused(write_config, tmp_path):
    config = write_config("run", STEPS, train={"length": STEPS, "batch_size": 2, "micro_batch_size": 1})
    for said in train_together(3, tmp_path / "store", config):
        assert said.startswith("error: train.batch_size is 2, and 3 processes share the samples of a step")


def test_an_image_that_one_process_cannot_read_stops_all(write_config, tmp_path):
    rows = write_data(tmp_path / "own", 12)
    tree = {"train": [{"path": str(rows)}], "workers": 0}
    config = write_config("run", STEPS, data=tree)
    own = FileSource.__getitem__

    def cannot_read(group):
        def read(source, row):
            if group.rank == 1 and (tmp_path / "run" / "checkpoints" / "step_000001").exists():
                raise VlmtuneError("3.png cannot be read.")
            return own(source, row)

        FileSource.__getitem__ = read

    said = train_together(2, tmp_path / "store", config, before=cannot_read)
    assert said == ["error: rank 1: 3.png cannot be read.", "error: 3.png cannot be read."]


def test_a_loss_that_is_not_finite_in_one_process_is_found(write_config, tmp_path):
    """The samples named are those of the process that has it, and so is what is saved."""
    config = write_config("run", STEPS, checkpoint={"every": 2})
    own = StepShare._forward

    def is_poisoned(group):
        if group.rank == 1:

            def forward(share, number, batch, weights):
                losses = own(share, number, batch, weights)
                is_third = (tmp_path / "run" / "checkpoints" / "step_000002").exists()
                return replace(losses, total=losses.total * (math.nan if is_third else 1.0))

            StepShare._forward = forward

    said = train_together(2, tmp_path / "store", config, before=is_poisoned)
    assert said[0] == said[1] and said[0].startswith("error: step 3: not finite: ")
    batch = json.loads((tmp_path / "run" / "failures" / "step_000003_rank1" / "failure.json").read_text())
    ids = [name for part in batch["micro_batches"] for name in part["samples"]]
    assert len(ids) == 2 and all(name in said[0] for name in ids)
    assert not (tmp_path / "run" / "failures" / "step_000003").exists()
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step_000002"


VARIANTS = {
    "bfloat16, frozen weights stored in it": {"train": {"precision": "bf16"}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}},
    "the features of the tower kept": {"data": {"vision_cache": "1GB"}},
    "new tokens": {"data": {"new_tokens": ["<left>", "<right>"]}, "plan": [{"match": "embed", "train": "new_rows"}]},
    "rows with padding": {"train": {"packing": False}},
    "stock modules": {"train": {"fused": False}},
}


@pytest.mark.parametrize("variant", by_default(["the features of the tower kept"], VARIANTS))
def test_in_parts_with_everything_else(variant, write_config, rows, tmp_path):
    """The losses of one process. Texts alone are among the samples."""

    def config_of(name: str) -> Path:
        wish = VARIANTS[variant]
        return write_config(
            name, STEPS,
            plan=[*wish.get("plan", []), *MIXED],
            data={"train": [{"path": str(rows)}], "workers": 0, **wish.get("data", {})},
            train={"length": STEPS, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1,
                   **wish.get("train", {})},
        )  # fmt: skip

    train_quietly(config_of("one"))
    assert [said["steps"] for said in train_together(2, tmp_path / "store", in_parts(config_of("two")))] == [STEPS] * 2
    same = 1e-2 if variant.startswith("bfloat16") else 1e-4
    for line, other in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=same)


@pytest.mark.parametrize("held", by_default([in_parts], [Path, in_parts]))
def test_all_go_back_when_one_is_not_finite(held, write_config, tmp_path):
    """rewind: to the checkpoint before, with lower rates, without the batch of that step."""
    config = held(write_config("run", STEPS, stability={"nonfinite": "rewind"}, checkpoint={"every": 2}))
    own, poisoned = StepShare.gradients, tmp_path / "poisoned"

    def is_poisoned_once(group):
        if group.rank == 1:

            def gradients(share, parts, weights, scale, step, wish):
                if step == 3 and not poisoned.exists():
                    poisoned.touch()
                    scale = math.nan
                return own(share, parts, weights, scale, step, wish)

            StepShare.gradients = gradients

    summaries = train_together(2, tmp_path / "store", config, before=is_poisoned_once)
    assert poisoned.exists() and [summary["steps"] for summary in summaries] == [STEPS] * 2
    state = read_state(latest_checkpoint(tmp_path / "run" / "checkpoints"))["state"]
    assert state["rewinds"] == [[3, 2]] and state["skipped"] == [3] and state["lr_scale"] == 0.5


@pytest.mark.slow
def test_a_chain_of_stages_in_parts(chain, tmp_path):
    """Every stage takes the model apart again, and begins from what the one before wrote."""

    def work(group):
        with Path(os.devnull).open("w") as nowhere:
            return train_chain(parts, Console(file=nowhere), processes=group)

    def config_of(name: str, **train) -> Chain:
        path = chain(name)
        tree = yaml.safe_load(path.read_text())
        tree["train"] |= train
        tree["optim"]["eps"] = 1e-2
        tree["stages"][2]["plan"] = WITHOUT_DROPOUT
        path.write_text(yaml.safe_dump(tree))
        return load_run_config(str(path))

    whole, parts = config_of("whole"), config_of("parts", shard=True)
    with Path(os.devnull).open("w") as nowhere:
        train_chain(whole, Console(file=nowhere))
    together(2, tmp_path / "store", work)
    last = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name.startswith("3"))[0]
    one, two = (final_tensors(tmp_path / name / last) for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({"optim": {"lr": 1e-2, "name": "adamw8bit"}}, "optim.name: adamw8bit"),
        ({"loss": {"balance": {"by": "gradnorm"}}}, "loss.balance gradnorm"),
    ],
)
def test_what_needs_a_whole_model_is_refused(sections, needed, write_config, tmp_path):
    config = in_parts(write_config("run", STEPS, **sections))
    for said in train_together(2, tmp_path / "store", config):
        assert said.endswith(
            f"{needed} needs a whole model in every process, but train.shard is true; change one of them."
        )
    assert not (tmp_path / "run").exists()


QLORA = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full"},
    {"match": "language.layers", "train": "lora", "rank": 4, "store": "nf4"},
    {"match": "*", "train": "frozen"},
]


def test_quantised_weights_are_not_taken_apart(write_config, tmp_path):
    for said in train_together(2, tmp_path / "store", in_parts(write_config("run", STEPS, plan=QLORA))):
        assert said.startswith("error: train.shard: language.layers.0.self_attn.q_proj.weight is quantised")


@pytest.mark.slow
def test_qlora_in_several_processes(write_config, tmp_path):
    """Each has the whole quantised model."""
    parts = {"plan": QLORA, "optim": {"lr": 1e-2, "warmup": 2, "eps": 1e-2}}
    train_quietly(write_config("one", STEPS, **parts))
    train_together(2, tmp_path / "store", write_config("two", STEPS, **parts))
    for line, other in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)  # another order of sums (SAME_LOSS)


def test_a_model_that_is_too_large_for_one_is_taken_apart(write_config, tmp_path, monkeypatch):
    """auto: by the memory that is there."""
    config = write_config("run", STEPS)
    held = {}
    for there in (2**40, 2**20):
        monkeypatch.setattr("vlmtune.prepare.memory_there", lambda device, there=there: there)

        def work(group):
            made = prepare(load_config(str(config)), torch.device("cpu"), Console(quiet=True), False, processes=group)
            return [is_sharded(made.model), held_bytes(made.model)]

        held[there] = together(2, tmp_path / str(there), work)
    assert [is_in_parts for is_in_parts, _ in held[2**40]] == [False, False]
    assert [is_in_parts for is_in_parts, _ in held[2**20]] == [True, True]
    assert max(bytes_ for _, bytes_ in held[2**20]) < 0.6 * held[2**40][0][1], "a half, and adapters"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_starts_torchrun(write_config, tmp_path):
    config = write_config("run", 3)
    done = subprocess.run(
        [sys.executable, "-m", "vlmtune", "train", str(config), "--nproc", "2", "train.log_every=2"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share every step") == 1 and "trained 3 steps" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_others_that_do_not_come_are_waited_for_as_long_as_the_config_says(write_config, vlmtune, monkeypatch):
    nobody = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29431}
    for name, value in nobody.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    code, _, err = vlmtune("train", write_config("run", STEPS), "train.rank_timeout=1")
    assert code == 1 and "rank 1 of 2 did not find the others at 127.0.0.1:29431 within 1 s" in " ".join(err.split())
    assert time.monotonic() - began < 60, "300 s is the default"


@pytest.mark.slow
def test_the_command_says_what_the_processes_say(write_config):
    config = write_config("run", 3)
    wrong = subprocess.run(
        [sys.executable, "-m", "vlmtune", "train", str(config), "train.batch_size=1", "--nproc=2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert wrong.returncode == 1
    said = wrong.stderr.splitlines()
    assert said and all(line.startswith("error: rank ") for line in said), "torchrun's own words are left out"


@pytest.mark.slow
def test_torchrun_continues_after_a_process_was_killed(write_config, tmp_path):
    train_together(2, tmp_path / "store", write_config("whole", 30))
    config, run = write_config("killed", 30), tmp_path / "killed"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "vlmtune"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *start, "train", str(config)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        while not (run / "checkpoints" / "step_000003").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        workers = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert process.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("continuing from") == 1 and said.count("trained 30 steps") == 1
    whole, killed = final_tensors(tmp_path / "whole"), final_tensors(run)
    assert all(torch.equal(killed[name], value) for name, value in whole.items())
    refused = subprocess.run(
        [sys.executable, *start, "train", str(config), "--restart"], capture_output=True, text=True, env=environment
    )
    assert refused.returncode and "--restart would delete the run again" in refused.stderr

"""Runs in child processes that can be killed, and what is compared of two runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from vlmtune.checkpoint import latest_checkpoint
from vlmtune.config import load_config
from vlmtune.run import train

NULL = Path(os.devnull)


def fork(work) -> int:
    """Run `work` in a child process that never returns into pytest; its exit code is 0 only if `work` came back."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        os.write(2, f"child: {error!r}\n".encode())
    finally:
        os._exit(code)


def train_quietly(config: Path) -> dict:
    with NULL.open("w") as nowhere:
        return train(load_config(str(config)), Console(file=nowhere))


def wait_for_step(run: Path, step: int, pid: int) -> None:
    """Until the child has a checkpoint of at least `step`."""
    for _ in range(6000):
        newest = latest_checkpoint(run / "checkpoints")
        if newest is not None and int(newest.name.removeprefix("step_")) >= step:
            return
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"the child ended before step {step}"
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within 30 s")


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / "latest"
    names = ("trained.safetensors", "adapter/adapter_model.safetensors", "optimizer.safetensors")
    return {f"{name}:{key}": value for name in names for key, value in load_file(folder / name).items()}


def numbers(record: dict) -> dict:
    """A line of history without times and memory."""
    timed = ("seconds", "data_wait", "per_second", "memory")
    return {key: value for key, value in record.items() if not key.endswith(timed)}


def sampled_data(rows: Path, wish: dict, workers: int = 0, **source) -> dict:
    """The data section of a run on one file. wish: data.sampling; source: further fields of the file's entry."""
    return {"train": [{"path": str(rows), **source}], "sampling": wish, "workers": workers}


def run_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"])


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "trained.safetensors")

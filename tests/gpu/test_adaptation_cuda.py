"""What only a GPU has: paged optimizers, quantised weights that are read straight onto it. Skips itself without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_setup import write_data

from vlmtune.config import parse_config
from vlmtune.run import train
from vlmtune.use import load_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run_of(tiny_folder, tmp_path: Path, **sections) -> Path:
    plan = [
        {"match": "projector", "train": "full"},
        {"match": "language", "train": "lora", "rank": 4, "store": sections.pop("store", "fp32")},
        *({"match": part, "train": "frozen"} for part in ("vision", "embed", "lm_head")),
    ]
    config = {
        "model": str(tiny_folder("llava")),
        "run": str(tmp_path / "run"),
        "data": {"train": [{"path": str(write_data(tmp_path / "data", 12))}], "workers": 0},
        "plan": plan,
        "train": {"length": 4, "batch_size": 4, "micro_batch_size": 2, "log_every": 1},
        **sections,
    }
    train(parse_config(config), Console(quiet=True))
    return tmp_path / "run"


@pytest.mark.parametrize("store", ["nf4", "int8"])
def test_a_quantised_base_lies_on_the_gpu_and_trains(store, tiny_folder, tmp_path):
    run = run_of(tiny_folder, tmp_path, store=store)
    model = load_run(run, "latest").model
    devices = {name: p.device.type for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert devices and set(devices.values()) == {"cuda"}
    tensors = load_file(run / "checkpoints" / "latest" / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimizers_run_and_resume(name, tiny_folder, tmp_path):
    run = run_of(tiny_folder, tmp_path, optim={"name": name, "lr": 1e-3})
    state = load_file(run / "checkpoints" / "latest" / "optimizer.safetensors")
    assert any(key.endswith("/state1") for key in state)

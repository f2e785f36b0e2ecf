"""What only a GPU has: paged optimizers, quantised weights that are read straight onto it. Skips itself without one."""

from __future__ import annotations

import pytest
import torch
from cuda_setup import run_of
from safetensors.torch import load_file

from vlmtune.use import load_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("store", ["nf4", "int8"])
def test_a_quantised_base_lies_on_the_gpu_and_trains(store, tiny_folder, tmp_path):
    run = run_of(tiny_folder("llava"), tmp_path, store=store)
    model = load_run(run, "latest").model
    devices = {name: p.device.type for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert devices and set(devices.values()) == {"cuda"}
    tensors = load_file(run / "checkpoints" / "latest" / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimizers_run_and_resume(name, tiny_folder, tmp_path):
    run = run_of(tiny_folder("llava"), tmp_path, optim={"name": name, "lr": 1e-3})
    state = load_file(run / "checkpoints" / "latest" / "optimizer.safetensors")
    assert any(key.endswith("/state1") for key in state)

"""The test matrix: every method of a plan on every tiny family and the embedded architecture (SPEC C1-C5, C8).

Step 0 is the base model, every trainable parameter learns, nothing else moves, what is saved is what was trained, also
for a fresh process, switching off gives the base model back, and merging changes no answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_matrix import METHODS, load_for, logits_of, reload, rules_for
from safetensors.torch import load_file, save_file
from sizes_of_tests import by_default
from torch import nn
from training_setup import loss_and_gradients, micro_batches, snapshot

from vlmtune.adapt.library import adapters_off, merge_adapters, tuner_layers
from vlmtune.adapt.plan import Plan, apply_plan
from vlmtune.checkpoint import Draft, TrainState
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.load import load_model
from vlmtune.models.quantise import is_quantised
from vlmtune.models.tiny import FAMILIES
from vlmtune.models.vlm import set_training_mode
from vlmtune.optim.optimizer import build_adamw
from vlmtune.types import Batch, VlmtuneError

NAMES = [*FAMILIES, "embedded"]
EVERYWHERE = {"full", "lora", "nf4"}  # on every model in the usual test run
# a third of the other pairs: every method on two or three models, every model with several; `make test-slow` has all
PAIRS = [
    pytest.param(method, name, marks=[] if method in EVERYWHERE or (row + column) % 3 == 0 else pytest.mark.slow)
    for row, method in enumerate(METHODS)
    for column, name in enumerate(NAMES)
]


def train(model: nn.Module, plan: Plan, batch: Batch, steps: int = 2) -> torch.optim.Optimizer:
    """Optimizer steps as the trainer makes them; asserts that every parameter meant to learn has a gradient."""
    optimizer = build_adamw(plan.optimizer_groups(), (0.9, 0.999), 1e-8)
    set_training_mode(model)
    for _ in range(steps):
        _, gradients = loss_and_gradients(model, [batch])
        missing = [name for name, parameter in plan.parameters.items() if parameter.grad is None]
        assert not missing and gradients
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def save(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    Draft(folder, model, plan, optimizer, TrainState(step=2), "fingerprint", Objective()).write()


@pytest.fixture
def batch_of(encoded):
    def of(name: str) -> Batch:
        encoder, samples = encoded(name)
        return micro_batches(encoder, samples, 8)[0]

    return of


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_method(method, name, model_folder, batch_of, tmp_path):
    spec, batch, folder = METHODS[method], batch_of(name), model_folder(name)
    model, rules = load_for(folder, method)
    base = logits_of(model, batch.inputs)
    scale = float(base.abs().max())
    plan = apply_plan(model, rules, str(folder), seed=0)
    model.eval()

    start = logits_of(model, batch.inputs)  # step 0
    if spec.identity is None:
        assert not torch.equal(start, base)
    elif spec.identity == 0:
        assert torch.equal(start, base)
    else:
        assert float((start - base).abs().max()) < spec.identity * scale
    assert sum(row["trainable"] for row in plan.rows) == sum(p.numel() for p in plan.parameters.values())

    before = snapshot(model)  # training
    optimizer = train(model, plan, batch)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved - trainable == set(), "something moved that should not"
    assert len(moved) >= 0.9 * len(trainable), f"did not move: {sorted(trainable - moved)[:5]}"
    trained = logits_of(model, batch.inputs)
    assert float((trained - start).abs().max()) > 1e-4 * scale

    save(model, plan, optimizer, tmp_path / method / "step")  # saving
    assert torch.equal(reload(folder, method, tmp_path / method / "step", batch.inputs), trained)

    if tuner_layers(model) and not method.startswith(
        ("pissa", "olora")
    ):  # switching off: with the projector as trained
        with adapters_off(model):
            off = logits_of(model, batch.inputs)
        assert torch.equal(logits_of(model, batch.inputs), trained)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
        plain = load_for(folder, method)[0]
        mine = canonical_parameters(plain)
        with torch.no_grad():
            for key, parameter in plan.parameters.items():
                if key not in plan.adapter_parameters:
                    mine[key].copy_(parameter)
        assert torch.equal(off, logits_of(plain, batch.inputs))

    if not spec.merges:  # merging
        with pytest.raises(VlmtuneError, match="not linear"):
            merge_adapters(model)
    elif any(is_quantised(parameter) for parameter in model.parameters()):
        with pytest.raises(VlmtuneError, match="quantised; merge into the base"):
            merge_adapters(model)
    else:
        keys = list(load_model(str(folder)).state_dict())
        merge_adapters(model)
        assert list(model.state_dict()) == keys
        # float32 rounding of W x + dW x against (W + dW) x through a few layers
        assert float((logits_of(model, batch.inputs) - trained).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("name", by_default({"llava"}, NAMES))  # 30 to 80 seconds each
def test_a_fresh_process_gives_equal_logits(name, model_folder, batch_of, tmp_path):
    """One process loads the checkpoints of all methods: what it answers is bit for bit what was trained."""
    batch, folder = batch_of(name), model_folder(name)
    trained = {}
    for method in METHODS:
        model, rules = load_for(folder, method)
        plan = apply_plan(model, rules, str(folder), seed=0)
        optimizer = train(model, plan, batch, 1)
        trained[method] = logits_of(model, batch.inputs)
        (tmp_path / method).mkdir()
        save(model, plan, optimizer, tmp_path / method / "step")
    save_file({key: value.contiguous() for key, value in batch.inputs.items()}, tmp_path / "inputs.safetensors")
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tests / "method_matrix.py", folder, tmp_path / "inputs.safetensors"]
    done = subprocess.run(
        [*command, *(tmp_path / method / "step" for method in METHODS)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for method, logits in trained.items():
        assert torch.equal(load_file(tmp_path / method / "again.safetensors")["logits"], logits), method


def test_the_matrix_covers_every_method():
    from typing import get_args, get_type_hints

    from vlmtune.adapt.plan import Policy

    known = set(get_args(get_type_hints(Policy)["train"])) - {"frozen", "new_rows"}  # those have tests of their own
    used = {policy.train for method in METHODS.values() for policy in (method.language, *(p for _, p in method.front))}
    assert used == known


def test_a_mixed_plan_is_what_it_says(model_folder):
    """Four methods in one model, each where its rule says, all active at once."""
    model, rules = load_for(model_folder("llava"), "mixed")
    plan = apply_plan(model, rules, "base", seed=0)
    assert rules == rules_for(model, "mixed")
    methods = {adapter.name: (adapter.method, len(adapter.targets)) for adapter in plan.adapters}
    assert methods == {"default": ("lora", 7), "adapter_2": ("adapter", 2), "lora_3": ("lora", 7), "ia3_4": ("ia3", 3)}
    for adapter in plan.adapters:
        for path in adapter.targets:
            assert model.get_submodule(path).active_adapters == [adapter.name]

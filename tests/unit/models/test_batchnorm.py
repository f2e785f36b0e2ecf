"""BatchNorm under accumulation: found, frozen, or synced (SPEC G5). The embedded tower has 48 such layers."""

from __future__ import annotations

import pytest
import torch
from training_setup import encode_all, encoder_of, full_rules, micro_batches, snapshot, write_data

from vlmtune.adapt.plan import apply_plan
from vlmtune.checks.before import batchnorm_findings
from vlmtune.losses.objective import Objective
from vlmtune.models.batchnorm import SharedTower, batch_norms, freeze_statistics
from vlmtune.models.load import load_model
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.step import TrainingModule
from vlmtune.types import VlmtuneError


@pytest.fixture
def samples(embedded_folder, tmp_path):
    encoder = encoder_of(embedded_folder, "bins")
    return encoder, encode_all(encoder, write_data(tmp_path / "data", 8))


def trained(embedded_folder, samples, size: int, shared: bool, frozen: bool = False):
    """(gradients, statistics) of one step of 8 samples in micro-batches of `size`; the tower trains in full."""
    model = load_model(str(embedded_folder))
    plan = apply_plan(model, full_rules(model), "embedded", seed=0)
    if frozen:
        freeze_statistics(batch_norms(model, plan.parameters.values()).values())
    set_training_mode(model)
    encoder, encoded = samples
    batches = micro_batches(encoder, encoded, size)
    module = TrainingModule(VLM(model), Objective())
    weights = module.objective.weights(batches)
    tower = SharedTower(model) if shared else None
    if tower is not None:
        tower.begin(batches)
    for number, batch in enumerate(batches):
        module(batch if tower is None else tower.inputs(number, batch), weights).total.backward()
    if tower is not None:
        tower.finish()
    gradients = {name: p.grad.clone() for name, p in plan.parameters.items()}
    statistics = {n: v for n, v in snapshot(model).items() if n.endswith(("running_mean", "running_var"))}
    return gradients, statistics


def gap(one: dict, other: dict) -> float:
    """Of all numbers together, relative to their norm."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (difference / sum(float(value.square().sum()) for value in one.values())) ** 0.5


def test_synced_is_the_whole_batch_however_it_is_cut(embedded_folder, samples):
    """1 x 8 = 4 x 2 = 8 x 1: gradients of all parameters to 1e-4 (float32 sums in another order through 48 normalised
    layers), statistics to 1e-6. Without it they are other gradients altogether."""
    whole, statistics = trained(embedded_folder, samples, 8, shared=False)
    for size in (8, 4, 1):
        found, moved = trained(embedded_folder, samples, size, shared=True)
        assert set(found) == set(whole)
        assert gap(whole, found) < 1e-4, size
        assert gap(statistics, moved) < 1e-6
    apart, _ = trained(embedded_folder, samples, 1, shared=False)
    assert gap(whole, apart) > 0.1


def test_frozen_statistics_do_not_depend_on_the_cut_and_do_not_move(embedded_folder, samples):
    whole, before = trained(embedded_folder, samples, 8, shared=False, frozen=True)
    cut, after = trained(embedded_folder, samples, 2, shared=False, frozen=True)
    assert gap(whole, cut) < 1e-4 and all(torch.equal(before[name], after[name]) for name in before)
    base = snapshot(load_model(str(embedded_folder)))
    assert all(torch.equal(base[name], value) for name, value in after.items())
    assert any(name.startswith("vision") and "norm" in name for name in whole), "their weights train"


def test_what_a_run_says(embedded_folder, samples):
    """A warning with the figure and the remedy; a pass where it is one micro-batch, synced or frozen."""
    model = load_model(str(embedded_folder))
    plan = apply_plan(model, full_rules(model), "embedded", seed=0)
    encoder, encoded = samples
    parts, whole = micro_batches(encoder, encoded, 4), micro_batches(encoder, encoded, 8)
    (finding,) = batchnorm_findings(model, plan, parts, is_shared=False)
    assert finding.level == "warn" and "48 layers" in finding.evidence and "(4+4 samples)" in finding.evidence
    assert "frozen" in finding.remedy and "sync" in finding.remedy
    assert [f.level for f in batchnorm_findings(model, plan, parts, is_shared=True)] == ["pass"]
    assert [f.level for f in batchnorm_findings(model, plan, whole, is_shared=False)] == ["pass"]
    freeze_statistics(batch_norms(model, plan.parameters.values()).values())
    assert batchnorm_findings(model, plan, parts, is_shared=False) == []


def test_other_families_are_told_what_to_do(tiny_folder):
    with pytest.raises(VlmtuneError, match="batchnorm: frozen"):
        SharedTower(load_model(str(tiny_folder("qwen2_5_vl"))))

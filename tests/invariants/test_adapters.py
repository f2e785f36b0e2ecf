"""An adapter at step 0 is the base model, merging changes no answer, and frozen means bit-identical (classes 6-8)."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from training_setup import full_rules, lora_rules, make_trainer, micro_batches, snapshot

from vlmtune.adapt.library import merge_adapters, tuner_layers
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.state import trained_state
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.load import load_model
from vlmtune.models.tiny import FAMILIES

NAMES = [*FAMILIES, "embedded"]


def everywhere(model):
    """LoRA on every part that has linear modules; two ranks."""
    wishes = {
        "vision": Policy("lora", lr=1e-3, rank=2, alpha=4.0),
        "language": Policy("lora", lr=1e-3, rank=4, alpha=8.0),
        "lm_head": Policy("lora", lr=1e-3, rank=2, alpha=4.0),
    }
    return [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(model)]


def without_embedded_tower(model, name):
    rules = everywhere(model)
    return [r if r[0] != "vision" else ("vision", Policy("frozen")) for r in rules] if name == "embedded" else rules


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch.inputs, use_cache=False).logits[batch.inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_at_step_0_is_the_base_model(name, model_folder, encoded):
    """Class 6: B is zero, so W x + 0 is W x to the last bit."""
    encoder, samples = encoded(name)
    (batch,) = micro_batches(encoder, samples, 8)
    model = load_model(str(model_folder(name)))
    before = logits_of(model, batch)
    apply_plan(model, without_embedded_tower(model, name), "base", seed=0)
    assert sum(isinstance(m, BaseTunerLayer) for m in model.modules()) > 10
    assert torch.equal(logits_of(model.eval(), batch), before)


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged(name, model_folder, encoded):
    """Class 7. Adapters are made large (the effect is asserted), then merged: logits move by float32 rounding only."""
    encoder, samples = encoded(name)
    (batch,) = micro_batches(encoder, samples, 8)
    model = load_model(str(model_folder(name)))
    base, keys = logits_of(model, batch), list(model.state_dict())
    plan = apply_plan(model, without_embedded_tower(model, name), "base", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in plan.parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    adapted = logits_of(model, batch)
    scale = float(adapted.abs().max())
    assert float((adapted - base).abs().max()) > 0.01 * scale
    adapters = sum(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert merge_adapters(model) == adapters
    assert not tuner_layers(model) and list(model.state_dict()) == keys
    # W x + s·B(A x) against (W + s·B A) x: float32 rounding through 4 to 6 layers
    assert float((logits_of(model, batch) - adapted).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("name", NAMES)
def test_frozen_is_bit_identical_after_training(name, model_folder, data, tmp_path):
    """Class 8: all that the checkpoint does not hold, buffers included, is what it was; all that it holds has moved."""
    setup = make_trainer(model_folder(name), data, tmp_path, total_steps=3)
    before = snapshot(setup.model)
    setup.trainer.fit()
    after = setup.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    trainable = {key for key, p in setup.model.named_parameters() if p.requires_grad}
    assert moved == trainable
    canonical = canonical_parameters(setup.model)
    parts = {part_of(n) for n, p in canonical.items() if p.requires_grad}
    assert parts == {"projector", "language"}
    if name == "embedded":
        assert sum("running_mean" in key for key in before) > 20


def test_statistics_of_a_trained_batchnorm_are_in_the_checkpoint(model_folder, data, tmp_path):
    """The other side of class 8: a tower that trains moves its BatchNorm statistics, and they are saved."""
    setup = make_trainer(model_folder("embedded"), data, tmp_path, rules=full_rules, total_steps=2)
    before = snapshot(setup.model)
    setup.trainer.fit()
    after = setup.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    full, _ = trained_state(setup.model, setup.plan)
    buffers = {key for key in moved if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(buffers) > 60
    assert {f"buffer:{key}" for key in buffers} <= set(full)


@pytest.mark.parametrize("rules", [full_rules, lora_rules], ids=["full", "lora"])
def test_the_checkpoint_plus_the_base_is_the_trained_model(rules, model_folder, data, tmp_path):
    """Nothing that training changed is missing from the checkpoint, BatchNorm statistics included."""
    from vlmtune.checkpoint import load_weights

    folder = model_folder("embedded")
    setup = make_trainer(folder, data, tmp_path / "checkpoints", rules=rules, total_steps=2)
    setup.trainer.fit()
    fresh = load_model(str(folder))
    plan = apply_plan(fresh, rules(fresh), str(folder), seed=1)
    load_weights(tmp_path / "checkpoints" / "latest", fresh, plan)
    trained, loaded = setup.model.state_dict(), fresh.state_dict()
    assert set(trained) == set(loaded)
    assert [key for key in trained if not torch.equal(trained[key], loaded[key])] == []

"""Configurations that must give one and the same step: loss and every gradient (shared STYLE, classes 1, 2, 4, 9).

Tolerances are relative, in float32 (epsilon 6e-8). Regrouping samples changes the order of sums and the blocking of
matrix products through 4 to 6 layers and a few hundred terms each: 1e-5 on the loss, 1e-4 of a tensor's largest entry
on gradients. A wrong weighting of unequal replies is off by tens of percent.
"""

from __future__ import annotations

import pytest
import torch
from training_setup import full_rules, gradient_gap, lora_rules, loss_and_gradients, micro_batches

from vlmtune.adapt.plan import apply_plan
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import anatomy_of, canonical_parameters
from vlmtune.models.load import load_model
from vlmtune.models.tiny import FAMILIES
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.types import supervised_mask

NAMES = [*FAMILIES, "embedded"]
LOSS, GRADIENT = 1e-5, 1e-4


def prepared(folder, rules=full_rules):
    model = load_model(str(folder))
    apply_plan(model, rules(model), str(folder), seed=0)
    return model.eval()  # no dropout, BatchNorm with fixed statistics: batch statistics depend on the micro-batch


@pytest.mark.parametrize("name", NAMES)
def test_micro_batch_times_accumulation(name, model_folder, encoded):
    """Class 1: 8x1 = 4x2 = 1x8, with unequal reply lengths, two tasks and one sample without an image."""
    encoder, samples = encoded(name)
    lengths = [int(sample.supervised().sum()) for sample in samples]
    assert len(set(lengths)) > 4 and max(lengths) > 3 * min(lengths)
    model = prepared(model_folder(name))
    reference_loss, reference = loss_and_gradients(model, micro_batches(encoder, samples, 8))
    for size in (4, 1):
        loss, gradients = loss_and_gradients(model, micro_batches(encoder, samples, size))
        assert loss == pytest.approx(reference_loss, rel=LOSS)
        assert gradient_gap(reference, gradients) < GRADIENT


@pytest.mark.parametrize("name", NAMES)
def test_padded_equals_unpadded(name, model_folder, encoded):
    """Class 2: each token's loss in a padded batch equals its loss with the sample alone; so do the states."""
    encoder, samples = encoded(name)
    assert len({len(sample) for sample in samples}) > 4
    vlm = VLM(prepared(model_folder(name)))
    with torch.no_grad():
        together = vlm(micro_batches(encoder, samples, len(samples))[0])
        for row, batch in enumerate(micro_batches(encoder, samples, 1)):
            alone, mine = vlm(batch), together.row == row
            assert torch.equal(together.targets[mine], alone.targets) and torch.equal(together.kinds[mine], alone.kinds)
            # states have entries of order 1 (they come out of a norm); see the module's docstring for 1e-4
            torch.testing.assert_close(together.hidden[mine], alone.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", [full_rules, lora_rules], ids=["full", "lora"])
def test_gradient_checkpointing(name, rules, model_folder, encoded):
    """Class 4: on = off, bit for bit; with LoRA over frozen embeddings every planned gradient is there."""
    encoder, samples = encoded(name)
    batches = micro_batches(encoder, samples, 4)
    model = prepared(model_folder(name), rules)
    set_training_mode(model)
    if name == "embedded":
        model.model.vision_tower.eval()  # training BatchNorm, off and on would see statistics in motion
    layer = model.get_submodule(anatomy_of(model).language_layers)[0]
    calls: list[bool] = []
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(True))
    in_tower: list[bool] = []
    tower = model.get_submodule(anatomy_of(model).vision_layers)[0]
    tower.register_forward_pre_hook(lambda *_: in_tower.append(True))
    off_loss, off = loss_and_gradients(model, batches)
    once = len(calls)
    checkpoint_activations(model)
    on_loss, on = loss_and_gradients(model, batches)
    assert len(calls) - once == 2 * once, "checkpointing is on, but no layer was computed again"
    if rules is lora_rules:  # its tower is frozen: nothing in it is worth computing again
        assert len(in_tower) == 2 * once
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert len(on) >= 0.9 * len(trainable)  # some towers' last blocks are never read
    assert on_loss == off_loss
    assert set(on) == set(off) and all(torch.equal(on[n], off[n]) for n in on)


def test_gradient_checkpointing_works_below_a_frozen_language_model(model_folder, encoded):
    """Alignment trains the projector only; gradients still flow through the frozen layers, so those must recompute."""
    encoder, samples = encoded("llava")

    def projector_only(model):
        return [(p, r if p == "projector" else type(r)("frozen")) for p, r in full_rules(model)]

    model = prepared(model_folder("llava"), projector_only)
    checkpoint_activations(model)
    set_training_mode(model)
    calls: list[bool] = []
    layer = model.get_submodule(anatomy_of(model).language_layers)[0]
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(True))
    loss_and_gradients(model, micro_batches(encoder, samples, 8))
    assert len(calls) == 2
    assert not layer.mlp.training  # only the layer's own flag is on, inside nothing behaves as in training


@pytest.mark.parametrize("name", NAMES)
def test_the_hugging_face_loss(name, model_folder, encoded):
    """Class 9: with all weights 1 ours is the model's own loss on labels, gradients included."""
    encoder, samples = encoded(name)
    model = prepared(model_folder(name))
    (batch,) = micro_batches(encoder, samples, len(samples))
    loss, gradients = loss_and_gradients(model, [batch])
    labels = batch.inputs["input_ids"].masked_fill(~supervised_mask(batch.kinds), -100)
    assert int((labels != -100).sum()) == sum(Objective().weights([batch]).tokens.values()) > 30
    model.zero_grad(set_to_none=True)
    theirs = model(**batch.inputs, labels=labels, use_cache=False).loss
    theirs.backward()
    reference = {n: p.grad for n, p in canonical_parameters(model).items() if p.grad is not None}
    assert loss == pytest.approx(theirs.item(), rel=LOSS)
    assert gradient_gap(reference, gradients) < GRADIENT

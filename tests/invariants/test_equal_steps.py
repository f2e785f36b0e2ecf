"""Configurations that must give one and the same step: loss and every gradient (shared STYLE, classes 1, 2, 4, 9).

Tolerances are relative, in float32 (epsilon 6e-8). Regrouping samples changes the order of sums and the blocking of
matrix products through 4 to 6 layers and a few hundred terms each: 1e-5 on the loss, 1e-4 of a tensor's largest entry
on gradients. A wrong weighting of unequal replies is off by tens of percent.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sizes_of_tests import by_default
from training_setup import full_rules, gradient_gap, lora_rules, loss_and_gradients, micro_batches

from vlmtune.adapt.fused import FusedLora, own_forward, use_fused, use_stock
from vlmtune.adapt.plan import apply_plan
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import anatomy_of, canonical_parameters
from vlmtune.models.last_block import compute_everything
from vlmtune.models.load import load_model
from vlmtune.models.packing import is_packing, packing_refusal, use_packed_attention
from vlmtune.models.tiny import FAMILIES
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.types import supervised_mask

NAMES = [*FAMILIES, "embedded"]
LOSS, GRADIENT = 1e-5, 1e-4


def prepared(folder, rules=full_rules):
    model = load_model(str(folder))
    apply_plan(model, rules(model), str(folder), seed=0)
    return model.eval()  # no dropout, BatchNorm with fixed statistics: batch statistics depend on the micro-batch


def train_mode(model, name: str) -> None:
    """As in training, but for the embedded tower: with BatchNorm in training, steps would see statistics in motion."""
    set_training_mode(model)
    if name == "embedded":
        model.model.vision_tower.eval()


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


PACKED = ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava", "internvl", "embedded"]


def test_families_that_are_packed(model_folder):
    """The others say why not: their attention looks ahead within images."""
    refused = {name: packing_refusal(load_model(str(model_folder(name)))) for name in NAMES}
    assert [name for name, why in refused.items() if why is None] == [name for name in NAMES if name in PACKED]
    assert all("looks ahead" in why for name, why in refused.items() if name not in PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_padded(name, model_folder, encoded):
    """Class 2: without padding the same loss, states and gradients; recomputing in the backward changes no bit."""
    encoder, samples = encoded(name)
    model = prepared(model_folder(name))
    (batch,) = micro_batches(encoder, samples, len(samples))
    loss, gradients = loss_and_gradients(model, [batch])
    with torch.no_grad():
        padded = VLM(model)(batch)
    tokens: list[int] = []
    layers = model.get_submodule(anatomy_of(model).language_layers)
    layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    use_packed_attention(model)
    packed_loss, of_packed = loss_and_gradients(model, [batch])
    assert tokens == [int(batch.inputs["attention_mask"].sum())] and tokens[0] < batch.inputs["input_ids"].numel()
    assert packed_loss == pytest.approx(loss, rel=LOSS)
    assert gradient_gap(gradients, of_packed) < GRADIENT
    with torch.no_grad():
        packed = VLM(model)(batch)
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(packed.sequence[real], padded.sequence[real], atol=1e-4, rtol=1e-4)
    assert not packed.sequence[~real].any()
    for name_of in ("targets", "kinds", "row", "weights"):
        assert torch.equal(getattr(packed, name_of), getattr(padded, name_of))
    train_mode(model, name)
    off = loss_and_gradients(model, [batch])
    checkpoint_activations(model)
    on = loss_and_gradients(model, [batch])
    assert on[0] == off[0] and all(torch.equal(on[1][n], off[1][n]) for n in off[1])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rules", [full_rules, lora_rules], ids=["full", "lora"])
def test_the_last_block_computes_what_is_read(name, rules, model_folder, encoded):
    """The loss needs no more of it: same loss and gradients, fewer rows; asked for all states it computes them all."""
    encoder, samples = encoded(name)
    model = prepared(model_folder(name), rules)
    (batch,) = micro_batches(encoder, samples, len(samples))
    use_packed_attention(model)
    block = list(model.get_submodule(anatomy_of(model).language_layers))[-1]
    rows: list[int] = []
    block.mlp.gate_proj.register_forward_hook(lambda module, args, out: rows.append(out.shape[-2]))
    short = loss_and_gradients(model, [batch])
    assert block.mlp(torch.zeros(8, model.config.get_text_config().hidden_size)).shape[0] == 8  # called alone: whole
    rows.pop()
    checkpoint_activations(model)
    train_mode(model, name)
    again = loss_and_gradients(model, [batch])
    compute_everything(model)
    everything = loss_and_gradients(model, [batch])
    assert rows[:3] == [int(supervised_mask(batch.kinds[:, 1:]).sum())] * 3
    assert set(rows[3:]) == {int(batch.inputs["attention_mask"].sum())}
    assert short[0] == again[0] and all(torch.equal(short[1][n], again[1][n]) for n in short[1])
    assert short[0] == pytest.approx(everything[0], rel=LOSS)
    assert gradient_gap(everything[1], short[1]) < GRADIENT
    use_packed_attention(model)
    with torch.no_grad():
        whole = VLM(model)(batch)
        assert rows[-1] == int(batch.inputs["attention_mask"].sum())
        assert VLM(model)(batch, every_state=False).states is None
        torch.testing.assert_close(whole.hidden, VLM(model)(batch, every_state=False).hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", by_default({"qwen2_5_vl", "smolvlm"}, PACKED))
def test_packed_samples_do_not_see_each_other(name, model_folder, encoded):
    """Other words in one sample change no bit of the states of the others; text alone and equal lengths too."""
    encoder, samples = encoded(name)
    model = prepared(model_folder(name))
    use_packed_attention(model)
    assert is_packing(model)
    text = next(sample for sample in samples if not sample.pixels)
    for chosen in (samples[:4], [samples[0], samples[0]], [text, text, text]):
        (batch,) = micro_batches(encoder, chosen, len(chosen))
        with torch.no_grad():
            before = VLM(model)(batch).sequence
            changed = batch.inputs["input_ids"].clone()
            changed[0, -1 if len(chosen) == 1 else int(batch.inputs["attention_mask"][0].sum()) - 1] = 5
            after = VLM(model)(batch, read=changed).sequence
        assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


EXCHANGED = {
    "qwen2_5_vl": {"FusedNorm", "FusedGate", "FusedPatches"}, "qwen3_vl": {"FusedNorm", "FusedGate", "FusedPatches"},
    "smolvlm": {"FusedNorm", "FusedGate"}, "llava": {"FusedNorm", "FusedGate"}, "internvl": {"FusedNorm", "FusedGate"},
    "embedded": {"FusedNorm", "FusedGate"}, "gemma3": set(), "paligemma": set(),
}  # fmt: skip
"""Gemma's norms and feed-forward parts follow other formulas."""


FUSED = [(name, rules) for name in NAMES for rules in (full_rules, lora_rules)]


@pytest.mark.parametrize(
    ("name", "rules"), by_default({("qwen2_5_vl", lora_rules), ("llava", full_rules), ("gemma3", lora_rules)}, FUSED)
)
def test_fused_equals_own(name, rules, model_folder, encoded):
    """The same loss and gradients in fewer passes, in float32 and under autocast; undone, the same bits as before."""
    encoder, samples = encoded(name)
    model = prepared(model_folder(name), rules)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # at zero, A would have no gradient and the product no effect
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    batches = micro_batches(encoder, samples, 4)
    own_loss, own = loss_and_gradients(model, batches)
    classes = {module: type(module) for module in model.modules()}
    count = use_fused(model)
    mixed = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    adapted = sum(type(module) is FusedLora for module in model.modules())
    if name in EXCHANGED:
        assert {part for part in mixed if part in ("FusedNorm", "FusedGate", "FusedPatches")} == EXCHANGED[name]
    assert (adapted > 0) == (rules is lora_rules) and count == sum(
        type(module) is not classes[module] for module in model.modules()
    )
    loss, gradients = loss_and_gradients(model, batches)
    assert loss == pytest.approx(own_loss, rel=LOSS)
    assert set(gradients) == set(own) and gradient_gap(own, gradients) < GRADIENT
    with own_forward(model):
        assert all(type(module) is kept for module, kept in classes.items())
    assert any(type(module) is not kept for module, kept in classes.items()) == (count > 0)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half = loss_and_gradients(model, batches)
    use_stock(model)
    assert all(type(module) is kept for module, kept in classes.items())
    again_loss, again = loss_and_gradients(model, batches)
    assert again_loss == own_loss and all(torch.equal(again[n], own[n]) for n in own)
    with torch.autocast("cpu", torch.bfloat16):
        theirs_loss, theirs = loss_and_gradients(model, batches)
    # products in bfloat16 (epsilon 4e-3) through 4 to 6 layers, rounded at other places
    assert half_loss == pytest.approx(theirs_loss, rel=1e-2)
    assert gradient_gap(theirs, half) < 0.1


def test_plain_use_of_a_packing_model_is_unchanged(model_folder, encoded):
    """Padded forwards and generation, as evaluation and other libraries run them."""
    encoder, samples = encoded("llava")
    model = prepared(model_folder("llava"))
    (batch,) = micro_batches(encoder, samples, len(samples))
    with torch.no_grad():
        before = model(**batch.inputs, use_cache=False).logits
        said = model.generate(**micro_batches(encoder, samples[:1], 1)[0].inputs, max_new_tokens=4, do_sample=False)
        use_packed_attention(model)
        assert torch.equal(model(**batch.inputs, use_cache=False).logits, before)
        again = model.generate(**micro_batches(encoder, samples[:1], 1)[0].inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(said, again)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", [full_rules, lora_rules], ids=["full", "lora"])
def test_gradient_checkpointing(name, rules, model_folder, encoded):
    """Class 4: on = off, bit for bit; with LoRA over frozen embeddings every planned gradient is there."""
    encoder, samples = encoded(name)
    batches = micro_batches(encoder, samples, 4)
    model = prepared(model_folder(name), rules)
    train_mode(model, name)
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


@pytest.mark.parametrize("name", by_default({"qwen2_5_vl", "llava"}, NAMES))
@pytest.mark.parametrize("part", ["vision", "language"])
def test_gradient_checkpointing_of_one_part(name, part, model_folder, encoded):
    """Its blocks are computed again, and no others; not a bit changes."""
    encoder, samples = encoded(name)
    batches = micro_batches(encoder, samples, len(samples))
    model = prepared(model_folder(name))
    train_mode(model, name)
    anatomy, calls = anatomy_of(model), {"vision": 0, "language": 0}
    for side, path in (("vision", anatomy.vision_layers), ("language", anatomy.language_layers)):

        def count(*_, side=side):
            calls[side] += 1

        # inside of a block: the block itself is called once, and computes what is in it twice
        next(
            module for module in list(model.get_submodule(path))[0].modules() if not list(module.children())
        ).register_forward_pre_hook(count)
    off_loss, off = loss_and_gradients(model, batches)
    once = dict(calls)
    checkpoint_activations(model, [part])
    on_loss, on = loss_and_gradients(model, batches)
    other = "vision" if part == "language" else "language"
    assert calls[part] == 3 * once[part] and calls[other] == 2 * once[other]
    assert on_loss == off_loss and all(torch.equal(on[n], off[n]) for n in off)


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


@pytest.mark.parametrize("name", by_default(FAMILIES, NAMES))
def test_short_weights_change_no_bit(name, model_folder, encoded):
    """`store: auto`: under bfloat16 a product rounds its weights; weights that were rounded before give the same."""
    encoder, samples = encoded(name)
    batches = micro_batches(encoder, samples, len(samples))
    steps = []
    for store in ("fp32", "auto"):

        def stored(model, store=store):
            return [
                (rule, replace(policy, store="fp32" if policy.train == "full" else store))
                for rule, policy in lora_rules(model)
            ]

        model = prepared(model_folder(name), stored)
        short = sum(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        assert bool(short) == (store == "auto")
        with torch.autocast("cpu", torch.bfloat16):
            steps.append(loss_and_gradients(model, batches))
    (loss, gradients), (again, others) = steps
    assert loss == again and gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[parameter]) for parameter, gradient in gradients.items())

"""The counted step against a real one: what the forward keeps, weights, gradients, state, depth, NF4's constants."""

from __future__ import annotations

import copy
import weakref

import method_matrix
import pytest
import torch
from sizes_of_tests import by_default
from training_setup import encode_all, encoder_of, micro_batches, write_data
from transformers import AutoConfig

from vlmtune.adapt import counted_step
from vlmtune.adapt.ledger import Ledger
from vlmtune.adapt.memory import predict, predict_step
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.prediction import LIBRARIES, StepSettings
from vlmtune.adapt.stored import constant_bytes
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.load import load_model
from vlmtune.models.synthetic import BatchShape, synthetic_batch, with_depth
from vlmtune.models.tiny import FAMILIES
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.optim.optimizer import build_adamw
from vlmtune.optim.precision import autocast

SHAPE = BatchShape(2, 128, 1, 112, 112, 24)
METHODS = ("full", "lora")


def rules_of(model, method: str, store: str = "fp32"):
    """Full: everything. LoRA: on the language model, the projector in full, the rest frozen."""
    lora = {"language": Policy("lora", lr=1e-3, rank=4, store=store), "projector": Policy("full", lr=1e-3)}
    parts = dict.fromkeys(part_of(name) for name in canonical_parameters(model))
    return [(part, Policy("full", lr=1e-3) if method == "full" else lora.get(part, Policy("frozen"))) for part in parts]


def nbytes(tensors) -> int:
    """Of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address)


def real_step(model, method: str, batch, checkpointing: bool = False):
    """(bytes that a real forward keeps for the backward or returns, plan, optimizer) after one update."""
    plan = apply_plan(model, rules_of(model, method), "x", 0)
    if checkpointing:
        checkpoint_activations(model)
    set_training_mode(model)
    objective = Objective()
    weights = objective.weights([batch])
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.inputs.values()]}
    kept = []

    def keep(tensor):
        kept.append(weakref.ref(tensor))  # weak: what an unread block keeps goes when its output goes
        return tensor

    vlm = VLM(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast("bf16", torch.device("cpu")):
        states = vlm(batch, weights.kinds)
        losses = objective(states, vlm.head, batch, weights)
    alive = [
        *(t for ref in kept if (t := ref()) is not None),
        *(t for t in vars(states).values() if t is not None),
        losses.total,
        batch.kinds,
    ]
    size = nbytes([tensor for tensor in alive if tensor.untyped_storage().data_ptr() not in known])
    losses.total.backward()
    optimizer = build_adamw(plan.optimizer_groups(), (0.9, 0.999), 1e-8)
    optimizer.step()
    return size, plan, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_the_counted_forward_keeps_what_a_real_one_keeps(family, method, tiny_folder):
    model = load_model(str(tiny_folder(family)))
    batch = synthetic_batch(model.config, SHAPE)
    rules = rules_of(model, method)
    prediction = predict_step(copy.deepcopy(model.config), rules, batch, whole=True)
    batch.inputs = {name: value.contiguous() for name, value in batch.inputs.items()}
    real, plan, optimizer = real_step(model, method, batch)
    assert prediction.activations == pytest.approx(real, rel=0.01)

    trained = sum(p.numel() * p.element_size() for p in plan.parameters.values())
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert prediction.stored["weights trained"] == trained
    assert prediction.stored.get("weights fp32", 0) == base
    assert prediction.gradients == nbytes(p.grad for p in plan.parameters.values()) == trained
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert prediction.state == nbytes(state)
    assert prediction.trained == sum(p.numel() for p in plan.parameters.values())


def test_items_add_up_to_the_total(family, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder(family))
    model = load_model(str(tiny_folder(family)))
    prediction = predict(config, rules_of(model, "lora", "nf4"), SHAPE)
    place, peak = prediction.peak
    assert sum(peak.items.values()) == peak.total == prediction.total > prediction.first_step - prediction.state
    assert min(peak.items.values()) >= 0 and place in prediction.peaks
    assert 0 < prediction.image_share < 1


@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("lora", True)])
@pytest.mark.parametrize("family", by_default({"llava", "qwen2_5_vl"}, FAMILIES))
def test_few_blocks_say_what_all_blocks_say(family, method, checkpointing, tiny_folder):
    config = with_depth(AutoConfig.from_pretrained(tiny_folder(family)), 6, 7)
    model = load_model(str(tiny_folder(family)))
    settings = StepSettings(gradient_checkpointing=checkpointing)
    whole, few = (predict(config, rules_of(model, method), SHAPE, settings, whole=whole) for whole in (True, False))
    assert few.total == pytest.approx(whole.total, rel=2e-3)
    assert few.first_step == pytest.approx(whole.first_step, rel=2e-3)
    assert (few.state, few.gradients, few.trained, few.parameters) == (
        whole.state, whole.gradients, whole.trained, whole.parameters,
    )  # fmt: skip
    assert few.activations == pytest.approx(whole.activations, rel=2e-3)


def test_windowed_blocks_are_extended_too(tiny_folder):
    """Qwen2.5-VL's tower attends in windows but for some blocks; few blocks are counted as global ones."""
    config = AutoConfig.from_pretrained(tiny_folder("qwen2_5_vl"))
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 8, [3, 7]
    rules = rules_of(load_model(str(tiny_folder("qwen2_5_vl"))), "full")
    whole, few = (predict(config, rules, SHAPE, whole=whole) for whole in (True, False))
    assert few.total == pytest.approx(whole.total, rel=5e-3)


def test_rules_with_layers_take_the_whole_depth(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    rules = rules_of(model, "lora")
    one = ("language.layers[0:1]", Policy("full", lr=1e-3))
    place = next(n for n, (part, _) in enumerate(rules) if part == "language")
    mixed = [*rules[:place], one, *rules[place:]]
    plan = apply_plan(load_model(str(tiny_folder("llava"))), mixed, "x", 0)
    assert predict(model.config, mixed, SHAPE).trained == sum(p.numel() for p in plan.parameters.values())


@pytest.mark.parametrize("family", by_default({"llava", "qwen3_vl"}, FAMILIES))
def test_checkpointing_keeps_less(family, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder(family))
    rules = rules_of(load_model(str(tiny_folder(family))), "full")
    off, on = (predict(config, rules, SHAPE, StepSettings(gradient_checkpointing=wish)) for wish in (False, True))
    assert on.saved["language"] < 0.5 * off.saved["language"] and on.total < off.total


def test_what_settings_change(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder("llava"))
    rules = rules_of(load_model(str(tiny_folder("llava"))), "full")
    plain = predict(config, rules, SHAPE)
    eight = predict(config, rules, SHAPE, StepSettings(optimizer="adamw8bit"))
    paged = predict(config, rules, SHAPE, StepSettings(optimizer="paged_adamw", device="cuda"))
    twice = predict(config, rules, SHAPE, StepSettings(micro_batches=2))
    wide = predict(config, rules, SHAPE, StepSettings(precision="fp32"))
    assert eight.state < 0.5 * plain.state  # small tensors keep 8 bytes a number
    assert paged.state == 0 and paged.host == pytest.approx(8 * paged.trained)
    assert twice.total > plain.total and twice.total - plain.total <= plain.gradients
    assert wide.activations > plain.activations
    assert "libraries" in plain.peak[1].items and LIBRARIES["cuda"] == 0


def test_quantised_language_is_smaller(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder("llava"))
    model = load_model(str(tiny_folder("llava")))
    plain, four = (predict(config, rules_of(model, "lora", store), SHAPE) for store in ("fp32", "nf4"))
    saved = plain.stored["weights fp32"] - four.stored["weights fp32"]
    assert four.stored["weights nf4"] == saved // 8
    eight = predict(config, rules_of(model, "lora", "int8"), SHAPE)
    assert eight.stored["weights int8"] == saved // 4


@pytest.mark.parametrize("double", [False, True])
def test_constants_are_those_of_bitsandbytes(double):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(512, 384)
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    tensors = [state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    assert constant_bytes(weight.numel(), double) == sum(t.numel() * t.element_size() for t in tensors)


def test_the_ledger_strikes_off_what_dies():
    with Ledger() as ledger:
        first = torch.empty(1000)
        assert ledger.total == 4000
        second = first + 1
        assert ledger.total == 8000
        del first
        assert ledger.total == 4000 and ledger.peaks["build"].total == 8000
        view = second[10:]
        del second
        assert ledger.total == 4000  # the view holds the storage
        whole = torch.arange(6)
        assert whole.tolist() == [0, 1, 2, 3, 4, 5]  # integers are real
        assert view[torch.tensor([True, False, True] + [False] * 987)].shape == (2,)


@pytest.mark.parametrize("family", by_default(("qwen2_5_vl", "llava"), FAMILIES))
@pytest.mark.parametrize("method", METHODS)
def test_remembered_operations_are_those_that_torch_would_make(family, method, tiny_folder, monkeypatch):
    """The ledger's shortcuts change no byte at any place."""
    model = load_model(str(tiny_folder(family)))
    batch = synthetic_batch(model.config, SHAPE)
    settings = StepSettings(precision="bf16", gradient_checkpointing=True, fused=True)
    found = []
    for way in (Ledger._of_stand_ins, Ledger._without_data):
        monkeypatch.setattr(Ledger, "_of_stand_ins", way)
        monkeypatch.setattr(counted_step, "_counted", {})
        found.append(predict_step(model.config, rules_of(model, method), batch, settings))
    assert found[0] == found[1] and found[0].total > 0


def test_mixed_dtypes_are_converted_on_a_cpu_alone():
    peaks = {}
    for device in ("cpu", "cuda"):
        with Ledger(device) as ledger:
            wide, narrow = torch.empty(1000), torch.empty(1000, dtype=torch.bfloat16)
            wide += narrow
        peaks[device] = ledger.peaks["build"].total
    assert peaks == {"cpu": 6000 + 4000, "cuda": 6000}


@pytest.mark.parametrize("method", method_matrix.METHODS)
def test_every_method_can_be_predicted(method, tiny_folder, tmp_path):
    """What trains is counted as the plan has it: weights and gradients to the byte."""
    folder = tiny_folder("llava")
    encoder = encoder_of(folder)
    (batch,) = micro_batches(encoder, encode_all(encoder, write_data(tmp_path, 2)), 2)
    model, rules = method_matrix.load_for(folder, method)
    prediction = predict_step(model.config, rules, batch, StepSettings(precision="fp32"))
    plan = apply_plan(model, rules, "base", seed=0)
    assert prediction.trained == sum(parameter.numel() for parameter in plan.parameters.values())
    assert prediction.gradients == 4 * prediction.trained and prediction.total > prediction.gradients

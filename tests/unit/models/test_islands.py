"""Modules that stay in float32: what overflows in float16 does not there (SPEC G4).

Tiny sizes: float16 products are slow on CPUs.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from training_setup import encode_all, encoder_of, lora_rules, micro_batches, snapshot, write_data

from vlmtune.adapt.plan import apply_plan
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.islands import keep_float32
from vlmtune.models.load import load_model
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.optim.precision import autocast

CPU = torch.device("cpu")


@pytest.fixture
def batch(tiny_folder, family, tmp_path):
    encoder = encoder_of(tiny_folder(family))
    return micro_batches(encoder, encode_all(encoder, write_data(tmp_path / "data", 2)), 2)[0]


def hidden(model, batch, precision: str) -> torch.Tensor:
    with torch.no_grad(), autocast(precision, CPU):
        return VLM(model)(batch).hidden.float()


def overflowing(folder) -> torch.nn.Module:
    """The product inside the second layer's MLP passes 65504; what comes out of it is ordinary again."""
    model = load_model(str(folder)).eval()
    with torch.no_grad():
        for name, parameter in canonical_parameters(model).items():
            if ".layers.1." in name and name.startswith("language"):
                if "gate_proj.weight" in name or "up_proj.weight" in name:
                    parameter.mul_(3e4)
                elif "down_proj.weight" in name:
                    parameter.mul_(1e-9)
    return model


def covered(model, prefix: str | tuple[str, ...]) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in canonical_parameters(model).items() if name.startswith(prefix)]


def test_what_overflows_in_float16_is_right_on_an_island(tiny_folder, family, batch):
    """Of the float32 result, relative to its largest value: float16 keeps 11 bits, through two layers: 2 %."""
    model = overflowing(tiny_folder(family))
    expected = hidden(model, batch, "fp32")
    assert torch.isfinite(expected).all()
    assert not torch.isfinite(hidden(model, batch, "fp16")).all()
    names = keep_float32(model, covered(model, "language.layers.1"))
    assert len(names) == 1 and names[0].endswith("layers.1"), "the whole layer, so that the product inside is covered"
    found = hidden(model, batch, "fp16")
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("prefixes", [("language.",), ("vision.", "projector."), ("",)])
def test_every_layer_that_a_rule_covers_computes_in_float32(tiny_folder, family, batch, prefixes):
    """A whole part, and the whole model: layers stand in lists, which are never called themselves. What is left to
    bfloat16 is not covered. The head is not called at all: the loss reads its weights."""
    model = load_model(str(tiny_folder(family))).eval()
    parameters = covered(model, prefixes)
    wanted, dtypes = {id(parameter) for parameter in parameters}, {}

    def note(module, args, output):
        dtypes[module] = output.dtype

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note)
    keep_float32(model, parameters)
    hidden(model, batch, "bf16")
    inside = {module for module in dtypes if id(module.weight) in wanted}
    assert inside and {dtypes[module] for module in inside} == {torch.float32}
    assert {dtypes[module] for module in set(dtypes) - inside} <= {torch.bfloat16}


def test_a_copy_has_islands_of_its_own(tiny_folder, tmp_path):
    """Deep copies and pickles compute with their own weights, not with those of the model they came from."""
    model = load_model(str(tiny_folder("llava"))).eval()
    keep_float32(model, covered(model, "projector"))
    original = model.model.multi_modal_projector
    features = torch.randn(3, original.linear_1.in_features)
    expected = original(features)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert torch.equal(copied(features), expected)
        with torch.no_grad(), autocast("bf16", CPU):
            assert copied(features).dtype == torch.float32
            for parameter in copied.parameters():
                parameter.zero_()
            assert not copied(features).any()
    assert torch.equal(original(features), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generation_with_a_cache_is_that_of_float32(tiny_folder, family, batch):
    """Everything an island, under bfloat16: the replies are those without autocast, token by token."""
    model = load_model(str(tiny_folder(family))).eval()
    row = {name: value for name, value in batch.inputs.items()}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**row, **options, output_logits=True, return_dict_in_generate=True)
    keep_float32(model, covered(model, ""))
    with autocast("bf16", CPU):
        found = model.generate(**row, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a.float(), b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_without_autocast_nothing_changes(tiny_folder, family, batch):
    model = load_model(str(tiny_folder(family))).eval()
    before, keys = hidden(model, batch, "fp32"), set(snapshot(model))
    names = keep_float32(model, covered(model, "vision") + covered(model, "projector"))
    assert names and torch.equal(before, hidden(model, batch, "fp32")) and set(snapshot(model)) == keys
    forwards = [model.get_submodule(name).forward for name in names]
    assert keep_float32(model, covered(model, "vision") + covered(model, "projector")) == names
    assert [model.get_submodule(name).forward for name in names] == forwards, "a second call wraps nothing"


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_inside_an_island_learn_in_float32(tiny_folder, recompute, tmp_path):
    """LoRA in a layer that is an island, under bfloat16, with recomputed activations: its gradients are those of
    float32; outside the island they are not (bfloat16 keeps 8 bits)."""
    folder = tiny_folder("llava")
    encoder = encoder_of(folder)
    batch = micro_batches(encoder, encode_all(encoder, write_data(tmp_path / "data", 2)), 2)[0]
    dtypes = {}
    for island in (False, True):
        model = load_model(str(folder))
        plan = apply_plan(model, lora_rules(model), str(folder), seed=0)
        if recompute:
            checkpoint_activations(model)
        set_training_mode(model)
        if island:
            keep_float32(model, covered(model, "language.layers.0."))
        layer = model.get_submodule("model.language_model.layers.0.mlp.down_proj")
        seen = []
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        with autocast("bf16", CPU):
            VLM(model)(batch).hidden.float().square().mean().backward()
        handle.remove()
        dtypes[island] = set(seen)
        assert all(p.grad is not None for n, p in plan.parameters.items() if "lora_B" in n)
    assert dtypes == {False: {torch.bfloat16}, True: {torch.float32}}

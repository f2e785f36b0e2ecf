"""Prefix tuning on every family, Qwen's rotary positions and Gemma's image masks included (SPEC C5)."""

from __future__ import annotations

import pytest
import torch
from adapter_setup import (
    NAMES,
    SAMPLES,
    Case,
    check_a_fresh_process_loads_it,
    check_all_parameters_learn,
    check_checkpointing_changes_no_gradient,
    check_identity,
    check_off_is_base,
    check_save_and_load,
    decoder_targets,
    folder_of,
    greedy_without_cache,
    inject,
    logits_of,
    pack,
    shake,
    tuner_layers,
)
from peft import get_peft_model
from sizes_of_tests import by_default
from torch import nn

from vlmtune.adapt.prefix import PrefixConfig, PrefixLayer
from vlmtune.evaluate.generate import generate_replies
from vlmtune.models.anatomy import anatomy_of, canonical_parameters
from vlmtune.models.attention import (
    PREFIX_ATTENTION,
    Prefix,
    attending_to,
    prefix_attention,
    use_plain_attention,
    use_prefix_attention,
)
from vlmtune.models.load import load_model
from vlmtune.types import VlmtuneError


@pytest.fixture(scope="module")
def case(tiny_folder, embedded_folder):
    cases: dict[str, Case] = {}

    def of(name: str) -> Case:
        return cases.setdefault(name, Case(folder_of(name, tiny_folder, embedded_folder)))

    return of


def config_of(gated: bool = True, **more):
    return lambda model: PrefixConfig(
        **{"length": 5, "gated": gated, "target_modules": decoder_targets(model, ["self_attn"])} | more
    )


@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_the_base_model(name, case):
    model = check_identity(case(name), config_of())
    assert len(tuner_layers(model)) == len(model.get_submodule(anatomy_of(model).language_layers))
    config = model.config.get_text_config()
    key = tuner_layers(model)[0].prefixkv_key["default"]
    assert key.shape == (config.num_key_value_heads, 5, tuner_layers(model)[0].head_dim)
    names = [n for n, p in canonical_parameters(model).items() if p.requires_grad]
    assert names[0] == "language.layers.0.self_attn.prefixkv_key"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name, gated, case):
    check_all_parameters_learn(case(name), config_of(gated))


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_is_the_base_model(name, case):
    check_off_is_base(case(name), config_of())


@pytest.mark.parametrize("gated", by_default([True], [True, False]))
def test_saved_is_loaded(family, gated, case, tmp_path):
    expected = check_save_and_load(case(family), config_of(gated), tmp_path)
    if family == "qwen2_5_vl" and gated:
        check_a_fresh_process_loads_it(case(family), "vlmtune.adapt.prefix", tmp_path, expected)


def test_checkpointing_changes_no_gradient(family, case):
    check_checkpointing_changes_no_gradient(case(family), config_of())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_in_a_padded_batch_is_teacher_forcing(name, gated, case):
    here = case(name)
    model = here.model()
    base = generate_replies(model, here.encoder, [here.encoder.encode_prompt(s) for s in SAMPLES], 6, 4)
    shake(inject(model, config_of(gated)(model)), scale=1.0)
    prompts = [here.encoder.encode_prompt(s) for s in SAMPLES]
    replies = generate_replies(model, here.encoder, prompts, 6, batch_size=4)
    assert replies == [greedy_without_cache(model, here, s, 6) for s in SAMPLES]
    assert replies != base


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_right_changes_nothing(name, case):
    here = case(name)
    model = here.model()
    shake(inject(model, config_of()(model)))
    together = logits_of(model, here.batch)
    alone = torch.cat([logits_of(model, here.collate([s])) for s in SAMPLES])
    # other shapes, other kernels: float32 rounding through the layers
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.abs().max())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava", "internvl"])
@torch.no_grad()
def test_every_document_of_a_packed_row_has_the_prefix(family, case):
    here = case(family)
    model = here.model()
    shake(inject(model, config_of(False)(model)))
    samples = [SAMPLES[0], SAMPLES[2]]
    row, _ = pack(model, here, samples)
    packed = model(**row, use_cache=False).logits[0]
    alone = torch.cat([logits_of(model, here.collate([s])) for s in samples])
    assert float((packed - alone).abs().max()) < 1e-4 * float(alone.abs().max())


def test_without_a_prefix_it_is_sdpa(family, case):
    """To the last bit, with and without padding, in prefill and in generation; the tower keeps its own function."""
    here = case(family)
    model = here.model()
    prompts = [here.encoder.encode_prompt(s) for s in SAMPLES]
    alone = here.collate(SAMPLES[:1])
    before = logits_of(model, here.batch), logits_of(model, alone)
    replies = generate_replies(model, here.encoder, prompts, 5, 4)
    use_prefix_attention(model)
    assert model.get_decoder().config._attn_implementation == PREFIX_ATTENTION
    tower = model.get_submodule(anatomy_of(model).vision)
    assert tower.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(model, here.batch), before[0]) and torch.equal(logits_of(model, alone), before[1])
    assert generate_replies(model, here.encoder, prompts, 5, 4) == replies
    use_plain_attention(model)
    assert model.get_decoder().config._attn_implementation == "sdpa"


class Attention(nn.Module):
    """What the attention function reads of a module: 4 heads, 2 of them per key-value head."""

    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("mask", ["none", "bool", "float", "one query"])
@pytest.mark.parametrize("gated", [True, False])
def test_against_the_written_out_formula(mask, gated):
    """Softmax over prefix and tokens together, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    queries, keys = (1 if mask == "one query" else 7), 7
    query, key, value = draw(2, 4, queries, 8), draw(2, 2, keys, 8), draw(2, 2, keys, 8)
    prefix = Prefix(draw(2, 3, 8), draw(2, 3, 8), draw(4) if gated else None)
    causal = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:].expand(2, 1, -1, -1)
    allowed = causal.clone()
    if mask in ("bool", "float"):
        allowed[1, :, :, :2] = False  # padding on the left
        allowed[1, :, :2, 0] = True
    given = {"none": None, "one query": None, "bool": allowed}.get(mask, torch.zeros(2, 1, queries, keys).double())
    if mask == "float":
        given = given.masked_fill(~allowed, torch.finfo(torch.float64).min)

    def attend(k, v, ok):
        scores = (query @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3).masked_fill(~ok, -torch.inf)
        return (scores.softmax(-1) @ v.repeat_interleave(2, dim=1)).transpose(1, 2)

    everywhere = torch.ones(2, 1, queries, 3, dtype=torch.bool)
    joint = attend(
        torch.cat([prefix.key.expand(2, -1, -1, -1), key], 2),
        torch.cat([prefix.value.expand(2, -1, -1, -1), value], 2),
        torch.cat([everywhere, allowed], 3),
    )
    base = attend(key, value, allowed)
    expected = base + prefix.gate.view(1, 1, 4, 1) * (joint - base) if gated else joint
    module = Attention()
    with attending_to(module, prefix):
        out, _ = prefix_attention(module, query, key, value, given, scaling=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    plain, _ = prefix_attention(module, query, key, value, given, scaling=0.3)
    torch.testing.assert_close(plain, base, rtol=1e-10, atol=1e-10)


def test_an_open_gate_is_classic_prefix_tuning(case):
    here = case("qwen3_vl")
    gated, classic = here.model(), here.model()
    inject(gated, config_of(True)(gated))
    inject(classic, config_of(False)(classic))
    with torch.no_grad():
        for layer in tuner_layers(gated):
            layer.prefixkv_gate["default"].fill_(1.0)
    one, other = logits_of(gated, here.batch), logits_of(classic, here.batch)
    assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


def test_an_error_inside_leaves_no_prefix_behind(case):
    model = case("llava").model()
    inject(model, config_of()(model))
    attention = tuner_layers(model)[0]
    with pytest.raises(TypeError):
        attention(hidden_states=torch.ones(1, 3, 64))  # no position embeddings
    assert "_vlmtune_prefix" not in vars(attention.base_layer)


def test_it_cannot_be_merged_but_unloaded(case):
    here = case("gemma3")
    base = here.model()
    expected = logits_of(base, here.batch)
    model = get_peft_model(base, config_of()(base))
    shake(model)
    with pytest.raises(VlmtuneError, match="keep and load the adapter folder"):
        model.merge_and_unload()
    plain = model.unload()
    assert tuner_layers(plain) == [] and plain.get_decoder().config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(plain, here.batch), expected)


@pytest.mark.parametrize("child", ["mlp", "self_attn.q_proj"])
def test_only_attention_modules_of_the_language_model(child, case):
    model = case("llava").model()
    with pytest.raises(VlmtuneError, match="is not the attention module of a block"):
        inject(model, PrefixConfig(target_modules=decoder_targets(model, [child])))
    tower = rf"{anatomy_of(model).vision_layers}\.\d+\.self_attn"
    with pytest.raises(VlmtuneError, match="vision_tower.* is not the attention module of a block"):
        inject(model, PrefixConfig(target_modules=tower))


def test_other_attention_functions_are_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")), attention="eager")
    with pytest.raises(VlmtuneError, match="'eager'; load the model with sdpa"):
        inject(model, config_of()(model))


def test_two_active_prefixes_are_refused(case):
    model = case("llava").model()
    for name in ("one", "two"):
        inject(model, config_of()(model), name)
    assert all(isinstance(layer, PrefixLayer) and layer.active_here() == ["two"] for layer in tuner_layers(model))
    logits_of(model, case("llava").batch)
    for layer in tuner_layers(model):
        layer.set_adapter(["one", "two"])
    with pytest.raises(VlmtuneError, match="one, two are active on one attention module"):
        logits_of(model, case("llava").batch)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": True}, {"gated": "yes"}], ids=str)
def test_wrong_values(wrong):
    (name,) = wrong
    with pytest.raises(VlmtuneError, match=name):
        PrefixConfig(**wrong)

"""Bottleneck adapters on every family: identity at step 0, the papers' formulas, saving, switching off (SPEC C4)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_setup import (
    NAMES,
    Case,
    check_a_fresh_process_loads_it,
    check_all_parameters_learn,
    check_checkpointing_changes_no_gradient,
    check_identity,
    check_off_is_base,
    check_save_and_load,
    decoder_targets,
    folder_of,
    inject,
    logits_of,
    shake,
    tuner_layers,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import PeftType
from sizes_of_tests import by_default
from torch import nn

from vlmtune.adapt import extension
from vlmtune.adapt.bottleneck import BottleneckConfig, BottleneckLayer, find_sublayers
from vlmtune.adapt.extension import input_of, linear_modules, new_peft_type
from vlmtune.models.anatomy import anatomy_of, canonical_parameters, part_of
from vlmtune.types import VlmtuneError


@pytest.fixture(scope="module")
def case(tiny_folder, embedded_folder):
    cases: dict[str, Case] = {}

    def of(name: str) -> Case:
        return cases.setdefault(name, Case(folder_of(name, tiny_folder, embedded_folder)))

    return of


def everywhere(model: nn.Module) -> str:
    """Regex of all sub-layers of all blocks, the tower's too."""
    anatomy = anatomy_of(model)
    paths = [
        f"{layers}.{number}.{child}".replace(".", r"\.")
        for layers in (anatomy.language_layers, anatomy.vision_layers)
        for number, block in enumerate(model.get_submodule(layers))
        for child in find_sublayers(block)
    ]
    return "|".join(paths)


def config_of(mode: str, **more):
    return lambda model: BottleneckConfig(**{"dim": 8, "mode": mode, "target_modules": everywhere(model)} | more)


def in_language(mode: str):
    return lambda model: BottleneckConfig(dim=8, mode=mode, target_modules=decoder_targets(model, ["self_attn", "mlp"]))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_the_base_model(name, mode, case):
    model = check_identity(case(name), config_of(mode))
    anatomy = anatomy_of(model)
    blocks = len(model.get_submodule(anatomy.language_layers))
    tower = 0 if name == "embedded" else len(model.get_submodule(anatomy.vision_layers))
    assert len(tuner_layers(model)) == 2 * (blocks + tower)
    parts = {part_of(n) for n, p in canonical_parameters(model).items() if p.requires_grad}
    assert parts == ({"language"} if name == "embedded" else {"language", "vision"})


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name, mode, case):
    check_all_parameters_learn(case(name), in_language(mode))


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_is_the_base_model(name, case):
    check_off_is_base(case(name), config_of("sequential"))


@pytest.mark.parametrize("mode", by_default(["parallel"], ["sequential", "parallel"]))
def test_saved_is_loaded(family, mode, case, tmp_path):
    expected = check_save_and_load(case(family), config_of(mode, scale=0.5, activation="silu"), tmp_path)
    if family == "llava" and mode == "parallel":
        check_a_fresh_process_loads_it(case(family), "vlmtune.adapt.bottleneck", tmp_path, expected)


def test_checkpointing_changes_no_gradient(family, case):
    check_checkpointing_changes_no_gradient(case(family), config_of("parallel"))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_formula_on_a_linear_module(mode, activation):
    """Against the papers' formulas written out, on a layer whose input and output differ in width."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"fc": nn.Linear(6, 10), "other": nn.Linear(6, 6)})
    base, x = holder["fc"], torch.randn(3, 6)
    config = BottleneckConfig(dim=4, mode=mode, activation=activation, scale=0.7, target_modules=["fc"])
    inject(holder, config)
    shake(holder)
    layer = holder["fc"]
    assert isinstance(layer, BottleneckLayer) and not isinstance(holder["other"], BottleneckLayer)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    source = x if mode == "parallel" else base(x)
    inner = getattr(F, activation)(source @ down.weight.T + down.bias)
    torch.testing.assert_close(layer(x), base(x) + 0.7 * (inner @ up.weight.T + up.bias))
    torch.testing.assert_close(layer(input=x), layer(x))


def test_tuples_keep_what_follows_the_hidden_states():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(6, 6)

        def forward(self, hidden_states, position=None):
            return self.o_proj(hidden_states), position

    model = nn.ModuleDict({"attn": Attention()})
    inject(model, BottleneckConfig(dim=2, mode="parallel", target_modules=["attn"]))
    hidden, rest = model["attn"](hidden_states=torch.ones(1, 6), position="kept")
    assert hidden.shape == (1, 6) and rest == "kept"
    with pytest.raises(VlmtuneError, match="was called with position"):
        input_of((), {"position": 3}, "Attention")


def test_attributes_are_those_of_the_wrapped_module(family, case):
    model = case(family).model()
    blocks = model.get_submodule(anatomy_of(model).language_layers)
    before = {name: value for name, value in vars(blocks[1].self_attn).items() if not name.startswith("_")}
    assert {"layer_idx", "head_dim"} <= set(before)
    inject(model, in_language("sequential")(model))
    layer = blocks[1].self_attn
    assert isinstance(layer, BottleneckLayer)
    ours = {"training", "merged_adapters"}
    assert all(getattr(layer, name) == value for name, value in before.items() if name not in ours)
    assert layer.q_proj is layer.base_layer.q_proj
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018


def test_adapters_are_float32_around_a_bfloat16_base(case):
    model = case("llava").model().to(torch.bfloat16)
    before = logits_of(model, _in_bf16(case("llava").batch))
    inject(model, config_of("parallel")(model))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = logits_of(model, _in_bf16(case("llava").batch))
    assert after.dtype == torch.bfloat16 and torch.equal(before, after)


def _in_bf16(batch):
    inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in batch.inputs.items()}
    return type(batch)(inputs, batch.kinds, batch.tasks, batch.sample_ids)


def test_on_the_meta_device(case):
    """The memory estimate plans without weights."""
    model = case("qwen3_vl").model().to("meta")
    inject(model, config_of("sequential")(model))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_widths_of_quantised_modules(kind):
    quantised = pytest.importorskip("bitsandbytes").nn
    linear = getattr(quantised, kind)
    block = nn.ModuleDict({"mlp": nn.Sequential(linear(32, 64), nn.GELU(), linear(64, 16))})
    assert find_sublayers(block) == ["mlp"]
    inject(block, BottleneckConfig(dim=4, mode="parallel", target_modules=["mlp"]))
    assert block["mlp"].bottleneck_down["default"].weight.shape == (4, 32)
    assert block["mlp"].bottleneck_up["default"].weight.shape == (16, 4)
    assert block["mlp"].bottleneck_up["default"].weight.dtype == torch.float32


def test_it_cannot_be_merged(case):
    model = get_peft_model(case("llava").model(), in_language("sequential")(case("llava").model()))
    with pytest.raises(VlmtuneError, match="keep and load the adapter folder"):
        model.merge_and_unload()
    with pytest.raises(VlmtuneError, match="cannot be merged"):
        model.merge_adapter()
    plain = model.unload()
    assert tuner_layers(plain) == []


def test_lora_and_bottleneck_in_one_model(case):
    """On disjoint modules both stay active and trainable, and each is saved under its own name."""
    here = case("qwen2_5_vl")
    model = here.model()
    inject(model, LoraConfig(r=2, target_modules=decoder_targets(model, ["self_attn"], "0|1") + r"\.q_proj"), "low")
    inject(model, BottleneckConfig(dim=4, target_modules=decoder_targets(model, ["mlp"], "2|3")), "narrow")
    shake(model)
    both = logits_of(model, here.batch)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A.low" in n for n in names) and any("bottleneck_up.narrow" in n for n in names)
    for kind in ("LoraLayer", "BottleneckLayer"):
        for layer in tuner_layers(model):
            layer.enable_adapters(not any(base.__name__ == kind for base in type(layer).__mro__))
        assert not torch.allclose(logits_of(model, here.batch), both, atol=1e-4), kind
    low, narrow = (
        get_peft_model_state_dict(model, adapter_name=n, save_embedding_layers=False) for n in ("low", "narrow")
    )
    assert len(low) == 4 and all("lora_" in n for n in low)
    assert len(narrow) == 8 and all("bottleneck_" in n for n in narrow)


def test_bottleneck_around_an_attention_with_lora_inside(case):
    """Widths come from the base's modules, not from LoRA's."""
    model = case("llava").model()
    inject(model, LoraConfig(r=2, target_modules=decoder_targets(model, ["self_attn"]) + r"\.[qo]_proj"), "low")
    inject(model, in_language("parallel")(model), "narrow")
    shake(model)
    assert torch.isfinite(logits_of(model, case("llava").batch)).all()
    attention = model.get_submodule(anatomy_of(model).language_layers)[0].self_attn
    assert [m.out_features for m in linear_modules(attention)] == [64, 32, 32, 64]
    assert len(canonical_parameters(model)) == len(list(model.named_parameters()))


def test_a_second_adapter_switches_the_first_off_until_it_is_called_back(case):
    """peft: the adapter injected last is the only active one in the layers of its method."""
    model = case("llava").model()
    for number, name in enumerate(("one", "two")):
        target = decoder_targets(model, ["mlp"], str(number))
        inject(model, BottleneckConfig(dim=4, target_modules=target), name)
    first, second = tuner_layers(model)
    assert first.active_here() == [] and second.active_here() == ["two"]
    first.set_adapter(["one"])
    assert first.active_here() == ["one"] and second.active_here() == ["two"]


def test_find_sublayers(family, case):
    model = case(family).model()
    anatomy = anatomy_of(model)
    assert find_sublayers(model.get_submodule(anatomy.language_layers)[0]) == ["self_attn", "mlp"]
    attention, feed_forward = find_sublayers(model.get_submodule(anatomy.vision_layers)[0])
    assert attention in ("attn", "self_attn", "attention") and feed_forward == "mlp"


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 0}, {"dim": 2.5}, {"mode": "both"}, {"activation": "tanh"}, {"scale": float("nan")}, {"scale": "1"}],
    ids=str,
)
def test_wrong_values(wrong):
    (name,) = wrong
    with pytest.raises(VlmtuneError, match=name):
        BottleneckConfig(**wrong)


def test_a_module_without_matrices_is_refused(case):
    model = case("llava").model()
    with pytest.raises(VlmtuneError, match="input_layernorm .* holds no linear module"):
        inject(model, BottleneckConfig(target_modules=decoder_targets(model, ["input_layernorm"])))


def test_a_peft_that_changed_is_named(monkeypatch):
    with pytest.raises(VlmtuneError, match="already has a method BOTTLENECK"):
        new_peft_type("BOTTLENECK")
    monkeypatch.setattr(extension, "_ENUM_TABLES", ("_members_elsewhere_",))
    with pytest.raises(VlmtuneError, match="not a plain enum any more"):
        new_peft_type("ELSEWHERE")
    assert "ELSEWHERE" not in PeftType.__members__
    with pytest.raises(VlmtuneError, match="refused the method bottleneck"):
        extension.register("bottleneck", BottleneckConfig, type("T", (), {"prefix": "x_"}))

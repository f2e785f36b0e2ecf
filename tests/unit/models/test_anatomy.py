from __future__ import annotations

import re

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from vlmtune.models.anatomy import (
    ANATOMIES,
    PARTS,
    anatomy_of,
    canonical_name,
    canonical_parameters,
    part_modules,
    part_of,
    unreachable_parameters,
)
from vlmtune.models.efficientnet import EfficientNetLiteConfig
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.tiny import FAMILIES
from vlmtune.types import VlmtuneError

WITHOUT_TINY = sorted(set(ANATOMIES) - set(FAMILIES))
PEFT_METHODS_OUTSIDE_MODULES = {
    "adaption_prompt_", "cartridge_", "cpt_", "multitask_prompt_tuning_", "p_tuning_", "prefix_tuning_",
    "prompt_tuning_", "shadow_", "xlora_",
}  # fmt: skip


def on_meta(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def real_backward(model: nn.Module, processor) -> set[str]:
    """Canonical names without a gradient after one backward of image and text through the whole model."""
    image = Image.linear_gradient("L").convert("RGB").resize((128, 96))
    turns = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is there"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
    ]
    batch = processor.apply_chat_template([turns], tokenize=True, return_dict=True, return_tensors="pt")
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    model(**batch).logits.square().mean().backward()
    return {name for name, parameter in canonical_parameters(model).items() if parameter.grad is None}


def assert_complete(model: nn.Module) -> None:
    """Every parameter of the model under exactly one canonical name, in exactly one part and one list of modules."""
    canonical = canonical_parameters(model)
    parameters = list(model.parameters())
    assert [id(parameter) for parameter in canonical.values()] == [id(parameter) for parameter in parameters]
    assert {part_of(name) for name in canonical} <= set(PARTS)

    by_part = {part: {id(p) for name, p in canonical.items() if part_of(name) == part} for part in PARTS}
    modules = part_modules(model)
    assert tuple(modules) == PARTS
    for part, found in modules.items():
        inside = [id(p) for module in found for p in module.parameters()]
        assert len(inside) == len(set(inside))
        loose = {id(p) for name, p in canonical.items() if name == "projector.image_newline"}
        assert set(inside) == by_part[part] - loose, part


def test_mapping_is_complete_and_one_to_one(family, tiny_folder):
    model = load_model(str(tiny_folder(family)))
    assert_complete(model)
    names = canonical_parameters(model)
    for part in ("vision", "projector", "language", "embed"):
        assert any(part_of(name) == part for name in names), part
        assert part_modules(model)[part], part
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert ("lm_head.weight" in names) != is_tied
    assert names["embed.weight"] is model.get_input_embeddings().weight
    assert is_tied == (family in ("internvl", "gemma3"))


def test_names_have_the_documented_form(family, tiny_folder):
    model = load_model(str(tiny_folder(family)))
    names = canonical_parameters(model)
    assert {"language.layers.3.self_attn.q_proj.weight", "language.norm.weight", "embed.weight"} <= set(names)
    layers = {int(name.split(".")[2]) for name in names if name.startswith("vision.layers.")}
    assert layers == set(range(len(layers))) and len(layers) >= 2
    config = model.config.vision_config
    assert len(layers) == getattr(config, "depth", getattr(config, "num_hidden_layers", None))


def test_merger_inside_the_qwen_tower_is_projector(tiny_folder):
    names = canonical_parameters(load_model(str(tiny_folder("qwen2_5_vl"))))
    assert "projector.mlp.0.weight" in names
    assert not any(name.startswith("vision") and "merger" in name for name in names)
    names = canonical_parameters(load_model(str(tiny_folder("qwen3_vl"))))
    assert {"projector.merger.linear_fc1.weight", "projector.deepstack_merger_list.1.norm.weight"} <= set(names)
    assert not any(name.startswith("vision") and "merger" in name for name in names)


@pytest.mark.parametrize("model_type", WITHOUT_TINY)
def test_rows_without_a_tiny_model_hold_on_the_default_architecture(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    model = on_meta(config)
    assert model.config.model_type == model_type
    assert_complete(model)
    assert any(name.startswith("vision.layers.1.") for name in canonical_parameters(model))


def test_unreachable_is_what_a_real_backward_leaves_out(family, tiny_folder):
    folder = str(tiny_folder(family))
    model = load_model(folder)
    assert unreachable_parameters(model) == real_backward(model, load_processor(folder))


@pytest.mark.parametrize(
    ("family", "layer", "blocks_lost"),
    [("llava", -1, 0), ("llava", -3, 2), ("llava", 1, 2), ("llava", [-3, -2], 1), ("internvl", -2, 1)],
)
def test_unreachable_follows_vision_feature_layer(family, layer, blocks_lost, tiny_folder):
    folder = str(tiny_folder(family))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_feature_layer = layer
    model = transformers.AutoModelForImageTextToText.from_config(config)
    unreachable = unreachable_parameters(model)
    assert unreachable == real_backward(model, load_processor(folder))
    assert len({name.split(".")[2] for name in unreachable if name.startswith("vision.layers.")}) == blocks_lost


def test_siglip_pooling_head_is_unreachable(tiny_folder):
    folder = str(tiny_folder("gemma3"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_config.vision_use_head = True
    model = transformers.AutoModelForImageTextToText.from_config(config)
    unreachable = unreachable_parameters(model)
    assert "vision.head.probe" in unreachable
    assert unreachable == real_backward(model, load_processor(folder))


def test_names_after_peft_injection(family, tiny_folder):
    import peft

    model = load_model(str(tiny_folder(family)))
    before = list(canonical_parameters(model))
    targets = r".*\.(q_proj|qkv|linear_1|embed_tokens|lm_head)"
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        targets = r".*\.(q_proj|qkv|linear_1)"
    config = peft.LoraConfig(r=2, target_modules=targets)
    model = peft.inject_adapter_in_model(config, model, adapter_name="any_name")
    after = canonical_parameters(model)
    assert [name for name in after if "lora_" not in name] == before
    assert {"language.layers.0.self_attn.q_proj.lora_A.weight", "language.layers.0.self_attn.q_proj.weight"} <= set(
        after
    )
    assert not any(mark in name for name in after for mark in ("any_name", "base_layer"))
    assert any(name.startswith("vision.layers.0.") and "lora_B" in name for name in after)
    assert_complete(model)


@pytest.mark.parametrize("method", ["dora", "ia3", "loha", "oft", "trainable_tokens"])
def test_every_kind_of_adapter_gets_a_name_of_its_own(method, tiny_folder):
    import peft

    targets = r".*language_model\.layers.*\.(q_proj|v_proj)"
    config = {
        "dora": lambda: peft.LoraConfig(r=2, target_modules=targets, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=targets),
        "oft": lambda: peft.OFTConfig(oft_block_size=16, target_modules=targets),
        "trainable_tokens": lambda: peft.LoraConfig(
            r=2, target_modules=targets, trainable_token_indices={"embed_tokens": [1, 2]}
        ),
    }[method]()
    model = load_model(str(tiny_folder("llava")))
    before = set(canonical_parameters(model))
    model = peft.inject_adapter_in_model(config, model, adapter_name="default")
    after = canonical_parameters(model)
    assert before < set(after)
    assert not any("default" in name or "base_layer" in name for name in after)
    assert len(after) == len(list(model.parameters()))


def test_two_adapters_of_one_kind_on_one_module_are_refused(tiny_folder):
    import peft

    model = load_model(str(tiny_folder("llava")))
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    for name in ("first", "second"):
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    with pytest.raises(VlmtuneError, match="two parameters share the canonical name.*at most one adapter"):
        canonical_parameters(model)


def test_every_prefix_peft_knows_is_followed_by_an_adapter_name():
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()) - PEFT_METHODS_OUTSIDE_MODULES)
    assert len(prefixes) > 30
    anatomy = ANATOMIES["llava"]
    for prefix in [*prefixes, "bottleneck_"]:
        name = canonical_name(anatomy, f"model.language_model.layers.0.mlp.up_proj.{prefix}x.default.weight")
        assert name == f"language.layers.0.mlp.up_proj.{prefix}x.weight"


def test_attached_heads_are_a_part(tiny_folder):
    model = load_model(str(tiny_folder("qwen3_vl")))
    model.heads = nn.ModuleDict({"box": nn.Linear(64, 4)})
    assert {"heads.box.weight", "heads.box.bias"} <= set(canonical_parameters(model))
    assert part_modules(model)["heads"] == [model.heads]
    assert_complete(model)


def test_another_tower_is_looked_at_and_config_coordinates_win():
    config = transformers.LlavaConfig(
        vision_config=EfficientNetLiteConfig(192).to_dict(), vision_feature_layer=-1, coordinates="bins"
    )
    model = on_meta(config)
    anatomy = anatomy_of(model)
    assert anatomy.vision_layers == "model.vision_tower.blocks"
    assert anatomy.coordinates == "bins"
    assert_complete(model)
    assert unreachable_parameters(model) == set()
    assert "vision.layers.15.project.weight" in canonical_parameters(model)


def test_coordinates_of_paligemma():
    assert anatomy_of(on_meta(transformers.PaliGemmaConfig())).coordinates == "paligemma"


def test_coordinates_of_the_qwen_families(tiny_folder):
    assert anatomy_of(load_model(str(tiny_folder("qwen2_5_vl")))).coordinates == "pixels"
    assert anatomy_of(load_model(str(tiny_folder("qwen3_vl")))).coordinates == "norm1000"


def test_unknown_family_names_the_supported_ones():
    model = on_meta(transformers.AutoConfig.for_model("mllama"))
    with pytest.raises(VlmtuneError, match="model_type 'mllama'.*qwen2_5_vl.*paligemma"):
        anatomy_of(model)


def test_unknown_coordinates_are_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    model.config.coordinates = "furlongs"
    with pytest.raises(VlmtuneError, match="furlongs.*norm1000, pixels, bins, bins1000, markup, paligemma, kosmos2"):
        anatomy_of(model)


def test_wrong_layouts_are_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    with pytest.raises(VlmtuneError, match=re.escape("keeps its blocks in none of")):
        anatomy_of(model.model)
    model.model.vision_tower.encoder.layers = nn.Sequential(*model.model.vision_tower.encoder.layers)
    with pytest.raises(VlmtuneError, match="CLIPVisionModel.*keeps its blocks in none of"):
        anatomy_of(model)
    model = load_model(str(tiny_folder("gemma3")))
    del model.model.multi_modal_projector
    with pytest.raises(VlmtuneError, match="has no 'model.multi_modal_projector'"):
        anatomy_of(model)


def test_stray_parameter_is_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    model.stray = nn.Linear(2, 2)
    with pytest.raises(VlmtuneError, match="'stray.weight' of a llava model lies in no part"):
        canonical_parameters(model)

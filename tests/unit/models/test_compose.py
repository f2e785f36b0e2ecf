"""A model composed of an encoder and a language model: both keep what they compute, and the encoder of conversations
reads its template as any other (SPEC E)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from compose_setup import SIZES, TEMPLATE, write_language, write_vision
from safetensors.torch import load_file
from training_setup import encode_all, encoder_of, write_data

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.compose import compose
from vlmtune.models.efficientnet import imagenet_state_dict
from vlmtune.models.initialise import XAVIER_LIMIT
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.resampler import grid_positions
from vlmtune.types import VlmtuneError


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("parts")
    for kind in ("clip", "siglip"):
        write_vision(folder / kind, kind)
    for kind in ("llama", "qwen2"):
        write_language(folder / kind, kind)
    write_language(folder / "mute", "llama", template=None)
    return lambda name: str(folder / name)


COMBINATIONS = [
    (vision, language, projector)
    for vision in ("clip", "siglip", "efficientnet-lite0")
    for language in ("llama", "qwen2")
    for projector in ("mlp", "resampler")
    if (vision, language) != ("siglip", "qwen2")
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def composed(request, parts, tmp_path_factory):
    """(folder, what was made, vision, language, projector)"""
    vision, language, projector = request.param
    folder = tmp_path_factory.mktemp("composed") / "model"
    eye = vision if vision.startswith("efficient") else parts(vision)
    made = compose(eye, parts(language), folder, projector, queries=4, image_size=64 if eye == vision else None)
    return folder, made, vision, language, projector


def test_language_alone_answers_as_before(composed, parts):
    """The same logits, bit for bit, for every token that the language model had."""
    folder, _, _, language, _ = composed
    model, own = load_model(str(folder)), transformers.AutoModelForCausalLM.from_pretrained(parts(language))
    ids = torch.tensor([[5, 17, 99, 200, 3]])
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, own(input_ids=ids).logits
    size = min(found.shape[-1], expected.shape[-1], len(load_processor(str(folder)).tokenizer) - 1)
    assert torch.equal(found[..., :size], expected[..., :size])


def test_the_tower_sees_as_before(composed, parts):
    folder, _, vision, _, _ = composed
    model = load_model(str(folder))
    side = 64 if vision.startswith("efficient") else 56
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    if vision == "clip":
        own = transformers.CLIPVisionModel.from_pretrained(parts(vision)).eval()
    elif vision == "siglip":
        own = transformers.SiglipVisionModel.from_pretrained(parts(vision)).eval()
    else:
        stored = model.model.vision_tower.state_dict()
        assert all(torch.equal(stored[name], value) for name, value in imagenet_state_dict().items())
        return
    with torch.no_grad():
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, own(pixels).last_hidden_state)


def test_placeholders_are_as_many_as_features(composed, tmp_path):
    folder, made, vision, _, projector = composed
    encoder = encoder_of(folder)
    encoded = encode_all(encoder, write_data(tmp_path / "data", 4))
    grid = {"clip": 16, "siglip": 16, "efficientnet-lite0": 4}[vision]
    assert made.image_tokens == (4 if projector == "resampler" else grid)
    token = load_model(str(folder)).config.image_token_id
    for sample in encoded:
        assert int((sample.ids == token).sum()) == made.image_tokens * len(sample.geometry)
    model = load_model(str(folder))
    pixels = next(sample.pixels["pixel_values"] for sample in encoded if sample.geometry)
    assert model.model.get_image_features(pixel_values=pixels).pooler_output[0].shape == (made.image_tokens, 32)


def test_supervised_tokens_are_the_replies(composed, tmp_path):
    """The language model's template, system prompt and end of turn are its own; images stand where they belong."""
    folder, made, *_ = composed
    encoder = encoder_of(folder)
    sample = encode_all(encoder, write_data(tmp_path / "data", 2))[0]
    text = encoder.tokenizer.decode(sample.ids)
    assert text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + "<image>" * made.image_tokens
    )
    replies = encoder.tokenizer.decode(sample.ids[sample.supervised()])
    assert replies.endswith("<|im_end|>") and "<|im_start|>" not in replies and "<image>" not in replies


def test_the_projector_is_fresh_and_the_rest_has_parts(composed):
    folder, made, *_ = composed
    named = canonical_parameters(load_model(str(folder)))
    projector = {name: p for name, p in named.items() if name.startswith("projector.")}
    assert sum(p.numel() for p in projector.values()) == made.parameters["projector"]
    assert all(p.std() <= XAVIER_LIMIT * 1.2 for p in projector.values() if p.dim() > 1)
    assert {name.split(".")[0] for name in named} >= {"vision", "projector", "language", "embed"}


def test_the_placeholder_has_the_mean_row(composed):
    folder, *_ = composed
    model = load_model(str(folder))
    token, table = model.config.image_token_id, model.get_input_embeddings().weight
    torch.testing.assert_close(table[token], table[:token].mean(dim=0), atol=1e-6, rtol=1e-4)
    assert model.generation_config.suppress_tokens == [token]


def test_the_same_seed_gives_the_same_model(parts, tmp_path):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compose(parts("clip"), parts("llama"), tmp_path / name, "resampler", 4, seed=seed)
        states.append(load_model(str(tmp_path / name)).state_dict())
    one, same, other = states
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_positions_of_two_grids_agree_about_places():
    """The middle of the image has one position, in a grid of 1, 9 or 25 cells; no two cells of a grid share one."""
    grids = {count: grid_positions(count, 32, torch.device("cpu")) for count in (1, 9, 25)}
    torch.testing.assert_close(grids[1][0], grids[9][4], atol=1e-4, rtol=0)
    torch.testing.assert_close(grids[1][0], grids[25][12], atol=1e-4, rtol=0)
    assert torch.cdist(grids[25], grids[25]).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "llama"), "vision .*nowhere' cannot be loaded"),
        (("clip", "nowhere"), "language .*nowhere' cannot be loaded"),
        (("llama", "llama"), "is a llama, which LLaVA cannot hold"),
        (("clip", "mute"), "has no chat template"),
        (("clip", "missing.gguf"), "missing.gguf does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(parts, tmp_path, arguments, said):
    with pytest.raises(VlmtuneError, match=said):
        compose(*map(parts, arguments), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_do_not_fit_are_refused(parts, tmp_path):
    with pytest.raises(VlmtuneError, match="a square such as 64"):
        compose(parts("clip"), parts("llama"), tmp_path / "model", "resampler", 5)
    with pytest.raises(VlmtuneError, match="do not divide an image of 56"):
        compose(parts("clip"), parts("llama"), tmp_path / "model", "resampler", 9)
    with pytest.raises(VlmtuneError, match="takes 56 only"):
        compose(parts("clip"), parts("llama"), tmp_path / "model", image_size=64)
    with pytest.raises(VlmtuneError, match="multiples of 32"):
        compose("efficientnet-lite0", parts("llama"), tmp_path / "model", image_size=100)
    (tmp_path / "there").mkdir()
    with pytest.raises(VlmtuneError, match="compose writes a new folder"):
        compose(parts("clip"), parts("llama"), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def rewrite_language(source: str, folder: Path, config: type, dtype: torch.dtype = torch.float32, **options) -> str:
    """A language model of another kind beside the tokenizer of `source`; matrices large enough for logits near 3."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    own = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "bos_token_id": None,
           "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config(**own | options))
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            matrix.mul_(8)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "options", "why"),
    [
        (transformers.GraniteConfig, {"logits_scaling": 8.0}, "logits are not its head's alone"),
        (transformers.CohereConfig, {"logit_scale": 0.06}, "logits are not its head's alone"),
        (
            transformers.Gemma2Config,
            {"head_dim": 16, "final_logit_softcapping": 3.0},
            "logits are not its head's alone",
        ),
        (transformers.PhiConfig, {}, "its head is built otherwise"),
        (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}, "its head is built otherwise"),
    ],
)
def test_language_models_that_llava_would_change_are_refused(parts, tmp_path, config, options, why):
    """A scale or a cap behind the head would be lost without a word."""
    language = rewrite_language(parts("llama"), tmp_path / "lm", config, **options)
    with pytest.raises(VlmtuneError, match=why):
        compose(parts("clip"), language, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


@pytest.mark.parametrize("vision", ["clip", "efficientnet-lite0"])
def test_a_bfloat16_language_model_does_not_round_the_tower(parts, tmp_path, vision):
    language = rewrite_language(parts("llama"), tmp_path / "lm", transformers.LlamaConfig, torch.bfloat16)
    compose(vision if vision == "efficientnet-lite0" else parts(vision), language, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    if vision == "clip":
        own = transformers.CLIPVisionModel.from_pretrained(parts("clip")).state_dict()
    else:
        own = imagenet_state_dict()
    tower = load_model(str(tmp_path / "model")).model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in own.items())
    words = load_file(tmp_path / "lm" / "model.safetensors")
    layers = [name for name in words if ".layers." in name]
    assert layers and all(
        torch.equal(stored[f"language_model.{name}"], words[name].float()) for name in layers
    )  # every bfloat16 is a float32
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_a_processor_that_makes_no_squares_is_refused(parts, tmp_path):
    shutil.copytree(parts("clip"), tmp_path / "wide")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, do_center_crop=False)
    images.save_pretrained(tmp_path / "wide")
    with pytest.raises(VlmtuneError, match="32 placeholders for 16 features"):
        compose(str(tmp_path / "wide"), parts("llama"), tmp_path / "model")


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  "])
def test_the_template_is_kept_to_the_letter(tmp_path, parts, start):
    """White space in front too: it is part of what the language model was trained on."""
    language = str(write_language(tmp_path / "lm", "llama", start + TEMPLATE))
    compose(parts("clip"), language, tmp_path / "model")
    turns = [("user", " a b "), ("assistant", "c")]
    plain = [{"role": role, "content": text} for role, text in turns]
    typed = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    expected = transformers.AutoTokenizer.from_pretrained(language).apply_chat_template(plain, tokenize=False)
    processor = load_processor(str(tmp_path / "model"))
    assert processor.apply_chat_template(plain, tokenize=False) == expected
    assert processor.apply_chat_template(typed, tokenize=False) == expected


def test_special_tokens_of_the_language_model_stay_special(parts, tmp_path):
    shutil.copytree(parts("llama"), tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "lm")
    compose(parts("clip"), str(tmp_path / "lm"), tmp_path / "model")
    found = load_processor(str(tmp_path / "model")).tokenizer
    assert set(found.all_special_tokens) == {*tokenizer.all_special_tokens, "<image>"}
    assert found.image_token == "<image>"


def test_lora_reaches_every_matrix_of_the_resampler(parts, tmp_path):
    """Its attention too: what a rule names is what is trained."""
    compose(parts("clip"), parts("llama"), tmp_path / "model", "resampler", 4)
    model = load_model(str(tmp_path / "model"))
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in canonical_parameters(model).items()
        if name.startswith("projector.") and parameter.dim() == 2 and name != "projector.queries"
    }
    rules = [("projector", Policy(train="lora", rank=2)), ("*", Policy(train="frozen"))]
    plan = apply_plan(model, rules, "composed", seed=0)
    adapted = {name.split(".lora_")[0] for name in plan.adapter_parameters}
    assert len(matrices) == 6 and adapted == matrices

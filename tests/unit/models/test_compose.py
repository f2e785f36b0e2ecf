"""A model composed of an encoder and a language model: both keep what they compute, and the encoder of conversations
reads its template as any other (SPEC E)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from compose_setup import write_language, write_vision
from training_setup import encode_all, encoder_of, write_data

from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.compose import compose
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
        from vlmtune.models.efficientnet import imagenet_state_dict

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

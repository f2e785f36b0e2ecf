"""Published shapes: parameters as published, names that resolve, and batches that the models take."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from vlmtune.models.load import load_model
from vlmtune.models.shapes import SHAPES, Shape, resolve_shape
from vlmtune.models.synthetic import (
    BatchShape,
    build_without_data,
    depths,
    image_tokens,
    least_depths,
    synthetic_batch,
    tokens_per_image,
    with_depth,
)
from vlmtune.models.tiny import FAMILIES
from vlmtune.models.vlm import VLM
from vlmtune.types import VlmtuneError


def count_parameters(config) -> int:
    """Numbers in all weights, a tied head counted once. Takes about a second for 72B."""
    with torch.device("meta"):
        model = build_without_data(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.aliases[0])
def test_parameters_are_as_published(shape: Shape):
    assert count_parameters(shape.config()) == pytest.approx(shape.parameters, rel=1e-3)


def test_no_two_shapes_share_a_name():
    names = [name.lower() for shape in SHAPES for name in (shape.name, *shape.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "qwen/qwen2.5-vl-7b-instruct", "Qwen2.5-VL-7B"])
def test_a_name_resolves_in_any_case(name):
    found, config = resolve_shape(name)
    assert found == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.model_type == "qwen2_5_vl" and config.get_text_config().hidden_size == 3584


def test_a_folder_and_a_file_resolve(tiny_folder):
    folder = tiny_folder("llava")
    for path in (folder, folder / "config.json"):
        name, config = resolve_shape(str(path))
        assert name == str(path) and config.model_type == "llava"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(VlmtuneError, match=r"neither a folder .* did you mean qwen2.5-vl-7b"):
        resolve_shape("qwen2.5-vl-7c")
    with pytest.raises(VlmtuneError, match="known: qwen2-vl-2b, "):
        resolve_shape("zzz")
    with pytest.raises(VlmtuneError, match=r"holds no config\.json"):
        resolve_shape(str(tmp_path))
    broken = tmp_path / "config.json"
    for content, complaint in (
        ("{", "is not a config.json"),
        ("[]", "holds no mapping"),
        ('{"a": 1}', "model_type None"),
    ):
        broken.write_text(content)
        with pytest.raises(VlmtuneError, match=complaint):
            resolve_shape(str(tmp_path))
    broken.write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "x"}}))
    with pytest.raises(VlmtuneError, match="cannot be used"):
        resolve_shape(str(tmp_path))


def test_the_model_takes_the_batch(family, tiny_folder):
    """As many image placeholders as the tower makes features (the model itself compares them), and finite states."""
    model = load_model(str(tiny_folder(family)))
    batch = synthetic_batch(model.config, BatchShape(2, 128, 1, 112, 112, 20))
    states = VLM(model)(batch)
    assert states.hidden.shape[0] == 2 * 20 and bool(torch.isfinite(states.hidden).all())
    assert 0 < image_tokens(model.config, batch) <= 2 * tokens_per_image(model.config, 112, 112)


def test_a_batch_without_images(tiny_folder):
    model = load_model(str(tiny_folder("qwen2_5_vl")))
    batch = synthetic_batch(model.config, BatchShape(1, 32, images=0, supervised=4))
    assert set(batch.inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert VLM(model)(batch).hidden.shape[0] == 4


def test_impossible_batches_are_refused(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder("llava"))
    with pytest.raises(VlmtuneError, match="only 12 of 16 tokens carry no loss"):
        synthetic_batch(config, BatchShape(1, 16, 1, 56, 56, 4))
    with pytest.raises(VlmtuneError, match="tokens of a batch is 0"):
        BatchShape(tokens=0)
    with pytest.raises(VlmtuneError, match="are -1"):
        BatchShape(images=-1)
    with pytest.raises(VlmtuneError, match="9 of 9 tokens are to carry loss"):
        BatchShape(tokens=9, supervised=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_changes_depth_alone(family, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder(family))
    deep = with_depth(config, 7, 8)
    assert depths(deep) == (7, 8) and depths(config) != (7, 8)
    vision, language = least_depths(deep)
    steps = [count_parameters(with_depth(deep, vision + n, language)) for n in range(3)]
    assert steps[1] - steps[0] == steps[2] - steps[1] > 0
    steps = [count_parameters(with_depth(deep, vision, language + n)) for n in range(3)]
    assert steps[1] - steps[0] == steps[2] - steps[1] > 0

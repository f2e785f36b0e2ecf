from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from vlmtune.models.load import load_model, load_processor, save_processor
from vlmtune.types import VlmtuneError


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of a tiny folder that a test may damage."""

    def copy(family: str):
        return shutil.copytree(tiny_folder(family), tmp_path / family)

    return copy


def edit(path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_path_that_does_not_exist(load, tmp_path):
    with pytest.raises(VlmtuneError, match="model folder '.*missing' does not exist"):
        load(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmtuneError, match="is a file, not a model folder"):
        load(str(tmp_path / "file"))


def test_folder_without_config(tmp_path):
    with pytest.raises(VlmtuneError, match="config.json not found"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_hub_name_while_offline(load):
    with pytest.raises(VlmtuneError) as caught:
        load("someone/some-model-that-is-not-here")
    message = str(caught.value)
    assert "someone/some-model-that-is-not-here" in message and "\n" not in message
    assert "offline" in message.lower() or "connect" in message.lower()


def test_folder_of_an_unsupported_family(broken):
    folder = broken("llava")
    edit(folder / "config.json", model_type="mllama")
    with pytest.raises(VlmtuneError, match="'mllama', for which vlmtune has no anatomy.*qwen3_vl"):
        load_model(str(folder))


def test_missing_weights_are_refused_not_invented(broken):
    folder = broken("qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "merger.linear_fc1.weight" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VlmtuneError, match=r"lacks 1 weights.*merger.*linear_fc1\.weight"):
        load_model(str(folder))


def test_folder_without_weights(broken):
    folder = broken("llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(VlmtuneError, match="weights of .* cannot be read"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("processor_config.json", "processor_config.json or preprocessor_config.json"),
        ("tokenizer.json", "tokenizer.json or"),
        ("tokenizer_config.json", "tokenizer_config.json"),
    ],
)
def test_missing_processor_file_is_named_with_the_remedy(file, named, broken):
    folder = broken("llava")
    (folder / file).unlink()
    with pytest.raises(VlmtuneError, match=f"{named}.*copy them from the base model's folder"):
        load_processor(str(folder))


def test_image_processor_missing_inside_the_processor_config(broken):
    folder = broken("llava")
    edit(folder / "processor_config.json", image_processor=None)
    with pytest.raises(VlmtuneError, match="copy them from the base model's folder"):
        load_processor(str(folder))


def test_loading_uses_dtype_and_attention(tiny_folder):
    model = load_model(str(tiny_folder("llava")), dtype=torch.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_tied_weights_are_not_missing(tiny_folder):
    model = load_model(str(tiny_folder("gemma3")))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_processor_pads_right_and_prepares_images_with_pil(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    assert processor.tokenizer.padding_side == "right"
    assert type(processor.image_processor).__name__.endswith("Pil")
    padded = processor.tokenizer(["a", "a red circle"], padding=True)["attention_mask"]
    assert padded[0][0] == 1 and padded[0][-1] == 0


def test_saved_processor_reloads_and_keeps_what_the_source_had(family, tiny_folder, tmp_path):
    source = tiny_folder(family)
    processor = load_processor(str(source))
    save_processor(processor, str(source), tmp_path)
    sections = [json.loads((folder / "processor_config.json").read_text()) for folder in (source, tmp_path)]
    assert sections[0].get("video_processor") == sections[1].get("video_processor")
    again = load_processor(str(tmp_path))
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the processor saves its own video section")
def test_plain_save_would_lose_the_video_section(tiny_folder, tmp_path):
    load_processor(str(tiny_folder("qwen2_5_vl"))).save_pretrained(tmp_path)
    assert "video_processor" not in json.loads((tmp_path / "processor_config.json").read_text())


def test_video_section_of_an_older_layout_is_carried_over(broken, tmp_path):
    source = broken("qwen2_5_vl")
    edit(source / "processor_config.json", video_processor=None)
    section = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 8}
    (source / "video_preprocessor_config.json").write_text(json.dumps(section))
    save_processor(load_processor(str(source)), str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["video_processor"] == section


def test_saving_over_the_source_keeps_the_video_section(broken):
    folder = broken("smolvlm")
    section = json.loads((folder / "processor_config.json").read_text())["video_processor"]
    save_processor(load_processor(str(folder)), str(folder), folder)
    assert json.loads((folder / "processor_config.json").read_text())["video_processor"] == section


@pytest.mark.parametrize("side", ["left", None])
def test_padding_side_of_the_source_is_kept(side, broken, tmp_path):
    source = broken("llava")
    edit(source / "tokenizer_config.json", padding_side=side)
    save_processor(load_processor(str(source)), str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()).get("padding_side") == side


def test_transformers_stays_quiet(tiny_folder, capfd):
    load_model(str(tiny_folder("llava")))
    load_processor(str(tiny_folder("llava")))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == logging.ERROR


def test_types_and_package_do_not_import_transformers():
    code = "import sys, vlmtune, vlmtune.types, vlmtune.models.anatomy; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""data.template through the commands: train, predict and export use it, and the exported folder keeps it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoProcessor, GenerationConfig


@pytest.fixture
def without_template(tiny_folder, tmp_path) -> Path:
    """A model whose folder has no chat template, and whose generation config stops at another token than its eos."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llava"), folder)
    (folder / "chat_template.jinja").unlink()
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 5}))
    return folder


def test_a_template_goes_all_the_way(without_template, write_config, rows, vlmtune, tmp_path):
    data = {"train": [{"path": str(rows)}], "workers": 0, "template": "interleaved"}
    config = write_config("run", 3, model=str(without_template), data=data)
    run = Path(yaml.safe_load(config.read_text())["run"])
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "takes the place" not in out

    code, out, err = vlmtune("inspect", config, "--html", tmp_path / "page.html")
    assert (code, err) == (0, "") and (tmp_path / "page.html").is_file()
    code, out, err = vlmtune("predict", rows.parent / "0.png", "what is there", "--model", run)
    assert (code, err) == (0, "")

    code, _, err = vlmtune("export", run, tmp_path / "exported")
    assert (code, err) == (0, "")
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    rendered = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "User: Image 1: <image>\nwhat\nAssistant:"
    eos = processor.tokenizer.eos_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == [5, eos]
    code, _, err = vlmtune("predict", rows.parent / "0.png", "what is there", "--model", tmp_path / "exported")
    assert (code, err) == (0, "")


def test_a_model_without_a_template_is_refused(without_template, write_config, vlmtune):
    code, _, err = vlmtune("train", write_config("run", 3, model=str(without_template)))
    assert code == 1 and "the model has no chat template" in err and "data.template to one of ours" in err


def test_replacing_the_models_own_is_said(write_config, rows, vlmtune):
    data = {"train": [{"path": str(rows)}], "workers": 0, "template": "system"}
    code, out, _ = vlmtune("train", write_config("run", 3, data=data))
    assert code == 0 and "note: data.template system takes the place of the model's own chat template" in out


def test_single_names_the_sample_that_has_more_turns(write_config, rows, vlmtune):
    data = {"train": [{"path": str(rows)}], "workers": 0, "template": "single"}
    code, _, err = vlmtune("train", write_config("run", 3, data=data))
    assert code == 1 and "train.jsonl:2" in err and "takes one question and one reply" in err

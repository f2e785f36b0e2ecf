"""Compute by image complexity through whole runs: training, evaluation, check, export, prediction, token view."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from sizes_of_tests import by_default
from training_setup import png

from vlmtune.data.complexity_rule import rule_of
from vlmtune.models.load import load_processor
from vlmtune.use import open_model

RULE = {"measure": "edges", "simple": 0.05, "complex": 0.3}


def plain(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 300), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def mixed_rows(tmp_path) -> Path:
    """Eight conversations: pictures of one colour and of noise in turn."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = []
    for n in range(8):
        (folder / f"{n}.png").write_bytes(plain(["red", "blue", "green", "white"][n // 2]) if n % 2 == 0 else png(n))
        content = [{"type": "image", "image": f"{n}.png"}, {"type": "text", "text": "what is it"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red" if n % 2 else "a box"}]
        lines.append(json.dumps({"id": f"s{n}", "task": "vqa", "messages": messages}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


FAMILIES = ("llava", "qwen2_5_vl", "smolvlm")


@pytest.mark.parametrize("family", by_default({"llava"}, FAMILIES))
def test_a_run_and_what_is_made_of_it(vlmtune, write_config, mixed_rows, tiny_folder, tmp_path, family):
    source = {"path": str(mixed_rows)}
    config = write_config(
        "run", 2, model=str(tiny_folder(family)),
        data={"train": [source], "eval": {"val": [source | {"limit": 4}]}, "workers": 0, "complexity": RULE},
        evaluate={"max_new_tokens": 4, "gallery": 2}, optim={"lr": 1e-2, "warmup": 0},
    )  # fmt: skip
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, ""), out
    assert "complexity (edges): 4 of the first 8 images get fewer tokens than they would, " in out
    run = config.with_suffix("")
    found = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "eval" for line in found) and sum(line["kind"] == "train" for line in found) == 2

    code, out, err = vlmtune("export", run, tmp_path / "merged")
    assert (code, err) == (0, ""), out
    rule = rule_of(load_processor(str(tmp_path / "merged")).image_processor)
    assert {"measure": rule.measure, "simple": rule.simple, "complex": rule.complex} == RULE
    assert open_model(str(tmp_path / "merged"))[1].pictures.rule == rule

    replies = set()
    for model in (run, tmp_path / "merged"):
        asked = ("predict", mixed_rows.parent / "0.png", "what is it", "--model", model, "--max-new-tokens", 3)
        code, out, err = vlmtune(*asked)
        assert (code, err) == (0, "")
        replies.add(out)
    assert len(replies) == 1, "the exported folder gives simple images as few tokens as the run did"

    page = tmp_path / "view.html"
    for sample, says in (("s0", "Image 1: complexity 0.000 (edges), so it gets "), ("s1", "(edges), so it gets ")):
        code, out, err = vlmtune("inspect", config, "--sample", sample, "--html", page)
        assert (code, err) == (0, "") and says in page.read_text()
    if family == "llava":
        assert "so it gets 16 of 16 image tokens." in page.read_text()


def test_check_reports_it_and_cached_features_train_the_same(vlmtune, write_config, mixed_rows):
    """`vlmtune check` runs the same steps; with `data.vision_cache` the losses are the same to the last bit."""
    losses = {}
    for name, wish in (("plain", {}), ("kept", {"vision_cache": "1GB"}), ("again", {"vision_cache": "1GB"})):
        data = {"train": [{"path": str(mixed_rows)}], "workers": 0, "complexity": RULE, **wish}
        config = write_config(name, 2, data=data, optim={"lr": 1e-2, "warmup": 0})
        code, out, err = vlmtune("train", config)
        assert (code, err) == (0, ""), out
        history = (config.with_suffix("") / "history.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, history) if line["kind"] == "train"]
    assert losses["kept"] == losses["again"] and losses["kept"] == pytest.approx(losses["plain"], abs=1e-6)
    code, out, err = vlmtune("check", config, "run=" + str(config.with_suffix("")) + "-new")
    assert (code, err) == (0, "") and "complexity (edges): 4 of the first 8 images" in " ".join(out.split())


def test_what_cannot_be_merged_is_refused_before_the_run(vlmtune, write_config, mixed_rows, tmp_path):
    data = {"train": [{"path": str(mixed_rows)}], "workers": 0}
    config = write_config("run", 2, data=data | {"complexity": RULE | {"least": 0.5}})
    code, out, err = vlmtune("train", config)
    assert code != 0 and "data.complexity.least 0.5 has no effect on this model" in " ".join(err.split())
    config = write_config("run", 2, data=data | {"complexity": RULE | {"simple": 0.4}})
    code, out, err = vlmtune("train", config)
    assert code != 0 and "simple 0.4 and complex 0.3 are not in order" in " ".join(err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.complexity={measure: none, least: 0.1}", "least means nothing with measure: none"),
        ("data.complexity={leest: 0.2}", "unknown key data.complexity.leest (did you mean least?)"),
        ("data.complexity=true", "data.complexity is a section: write its keys, or {} for its defaults"),
    ],
)
def test_wrong_wishes_are_refused_with_the_remedy(write_config, vlmtune, override, complaint):
    code, _, err = vlmtune("train", write_config("run", 4), override)
    assert code == 1 and complaint in " ".join(err.split())

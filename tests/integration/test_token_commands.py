"""`data.new_tokens` and `data.add_coordinate_tokens` through every command, from YAML to a plain exported model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from sizes_of_tests import by_default
from training_setup import encode_all, encoder_of, micro_batches, png
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.config import load_config
from vlmtune.export import export_run
from vlmtune.run import train
from vlmtune.types import VlmtuneError
from vlmtune.use import evaluate_run, load_run

BOX = (4.0, 12.0, 30.0, 44.0)
PLAN = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full"},
    {"match": "language", "train": "full"},
    {"match": "embed", "train": "new_rows"},
    {"match": "lm_head", "train": "new_rows"},
]


TIED = ("internvl", "gemma3")


@pytest.fixture
def quiet():
    with open("/dev/null", "w") as nowhere:
        yield Console(file=nowhere)


@pytest.fixture(scope="session")
def boxes(tmp_path_factory) -> Path:
    """Four pictures with the same box each, which a random model can learn by heart in seconds."""
    folder = tmp_path_factory.mktemp("boxes")
    lines = []
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
        question = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "where is the circle"}]
        answer = [{"type": "text", "text": "<found>"}, {"type": "box", "boxes": [BOX]}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"b{i}", "task": "grounding", "messages": messages}))
    (folder / "boxes.jsonl").write_text("\n".join(lines))
    return folder / "boxes.jsonl"


@pytest.fixture
def config_of(write_config, boxes, tiny_folder):
    def write(family: str, steps: int, data: dict | None = None, **sections):
        wish = {"train": [{"path": str(boxes)}], "eval": {"val": [{"path": str(boxes), "limit": 2}]}, "workers": 0}
        tokens = {"coordinates": "bins1000", "add_coordinate_tokens": True, "new_tokens": ["<found>"]}
        plan = [rule for rule in PLAN if family not in TIED or rule["match"] != "lm_head"]
        defaults = {
            "model": str(tiny_folder(family)),
            "plan": plan,
            "evaluate": {"max_new_tokens": 8},
            "checkpoint": {"every": steps},
            "optim": {"lr": 1e-2, "warmup": "10%" if steps > 10 else 0},
        }
        return write_config("run", steps, data=wish | tokens | (data or {}), **defaults | sections)

    return write


@pytest.mark.parametrize("family", by_default({"qwen2_5_vl"}, ["qwen2_5_vl", "qwen3_vl", "internvl"]))
def test_boxes_are_learned_predicted_and_exported(family, config_of, boxes, vlmtune, tmp_path):
    """Train, evaluate, predict, export; the plain folder has the tokens, equal logits, and predicts the same.

    The replies do not end behind the box: a random model's old rows are so small that, frozen, they never win against
    the new ones. With Qwen3-VL the head trains in full.
    """
    path = config_of(family, 100)
    run = Path(load_config(str(path)).run)
    code, _, err = vlmtune("train", path, *(["plan.4.train=full"] if family == "qwen3_vl" else []))
    assert (code, err) == (0, "")
    scores = json.loads((run / "summary.json").read_text())["metrics"]["val/grounding"]["mean_iou"]
    assert scores["before"] < 0.5 and scores["after"] > 0.9
    table = {row["part"]: row for row in json.loads((run / "assignment.json").read_text())}
    assert table["embed"]["method"] == "new_rows 1009" and table["embed"]["trainable"] == 1009 * 64

    asked = ("predict", boxes.parent / "0.png", "where is the circle", "--max-new-tokens", 8, "--model")
    code, predicted, err = vlmtune(*asked, run)
    assert (code, err) == (0, "") and re.match(r"<found>\s*<box>(<loc_\d{3}>){4}</box>", predicted)
    seen = re.search(r"box in pixels: (.*)", predicted)[1]
    assert [float(value) for value in seen.split(", ")] == pytest.approx(BOX, abs=1.0)
    assert vlmtune("eval", run)[0] == 0

    assert vlmtune("export", run, tmp_path / "exported")[0] == 0
    assert json.loads((tmp_path / "exported" / "vlmtune_export.json").read_text())["new_tokens"] == 1009
    assert vlmtune(*asked, tmp_path / "exported") == (0, predicted, "")

    trained = load_run(run, "latest")
    plain, processor = (c.from_pretrained(tmp_path / "exported") for c in (AutoModelForImageTextToText, AutoProcessor))
    encoder = encoder_of(tmp_path / "exported", "bins1000")
    (batch,) = micro_batches(encoder, encode_all(encoder, boxes), 4)
    (same,) = micro_batches(trained.encoder, encode_all(trained.encoder, boxes), 4)
    assert torch.equal(batch.inputs["input_ids"], same.inputs["input_ids"])
    with torch.no_grad():
        ours, theirs = trained.model(**same.inputs).logits, plain.eval()(**batch.inputs).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())
    ids = processor.tokenizer("<found> <loc_025>", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).split() == ["<found>", "<loc_025>"]


def test_a_run_resumes_with_its_new_rows(config_of, quiet, tmp_path):
    """4 steps at once, and 2 + 2: equal weights."""
    whole = load_config(str(config_of("llava", 4, checkpoint={"every": 2})))
    train(whole, quiet)
    run = Path(whole.run)
    end = load_run(run, "step_000004").model.state_dict()
    for path in run.glob("checkpoints/*"):
        if path.is_symlink() or path.name == "step_000004":
            path.rename(tmp_path / f"away_{path.name}")
    train(whole, quiet)
    again = load_run(run, "latest").model.state_dict()
    assert any("new_rows" in key for key in end)
    assert [key for key in end if not torch.equal(end[key], again[key])] == []


def test_base_is_the_model_with_untrained_tokens(config_of, quiet, tmp_path):
    """So that before and after are measured alike; exporting it would export nothing that was trained."""
    config = load_config(str(config_of("llava", 1)))
    summary = train(config, quiet)
    before = summary["metrics"]["val/grounding"]["loss"]["before"]
    assert evaluate_run(Path(config.run), "base", quiet)["loss/val/grounding"] == pytest.approx(before, rel=1e-6)
    with pytest.raises(VlmtuneError, match="every tensor equals the base model's"):
        export_run(Path(config.run), "base", tmp_path / "exported", quiet)


def test_an_exported_model_trains_on_without_adding_anything(config_of, quiet, tmp_path, capsys):
    """The tokens are there: `auto` finds the convention in config.json, and the rows train as part of the table."""
    first = load_config(str(config_of("internvl", 2)))
    train(first, quiet)
    export_run(Path(first.run), "latest", tmp_path / "exported", quiet)
    sections = {"model": str(tmp_path / "exported"), "run": str(tmp_path / "second")}
    data = {"coordinates": "auto", "new_tokens": [], "add_coordinate_tokens": True}
    plan = [rule | ({"train": "full"} if rule["match"] == "embed" else {}) for rule in PLAN[:4]]
    path = config_of("internvl", 2, data, **sections, plan=plan)
    train(load_config(str(path)), Console())
    assert "new tokens" not in capsys.readouterr().out
    rows = json.loads((tmp_path / "second" / "assignment.json").read_text())
    assert {row["method"] for row in rows if row["part"] == "embed"} == {"full"}


def test_the_log_says_what_was_added(config_of, capsys):
    train(load_config(str(config_of("llava", 1))), Console(width=300))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("new tokens"))
    assert line == (
        "new tokens: 1009 (<box> … <found>), rows 395 to 1403 of 1404, each the mean of the rows of the tokens that "
        "were there"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"add_coordinate_tokens": False}, r"need 1008 tokens .* set data.add_coordinate_tokens: true"),
        ({"coordinates": "norm1000"}, r"add_coordinate_tokens: coordinates 'norm1000' have no tokens of their own"),
        ({"new_tokens": ["<box>"]}, r"new token '<box>' is asked for twice"),
        ({"new_tokens": ["</s>"]}, r"new token '</s>' is in the tokenizer already"),
        ({"new_tokens": "<found>"}, r"data.new_tokens: .* list"),
    ],
)
def test_what_is_refused(data, message, config_of, quiet):
    path = config_of("llava", 1, data)
    with pytest.raises(VlmtuneError, match=message):
        train(load_config(str(path)), quiet)
    assert not Path(yaml.safe_load(path.read_text())["run"]).exists()

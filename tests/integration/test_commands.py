"""Every command, as a user types it, on a tiny model: exit code, what is printed, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForImageTextToText

from vlmtune.config import recipe_names
from vlmtune.data.prompts import PROMPTS
from vlmtune.observe.log import read_history


@pytest.fixture
def config(write_config, rows) -> Path:
    data = {"train": [{"path": str(rows)}], "eval": {"val": [{"path": str(rows), "limit": 2}]}, "workers": 0}
    wish = {"every": 2, "generate": True, "max_new_tokens": 3, "gallery": 2}
    return write_config("run", 4, data=data, evaluate=wish)


@pytest.fixture
def run(config, vlmtune) -> Path:
    code, _, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    return Path(yaml.safe_load(config.read_text())["run"])


def test_train(config, vlmtune):
    code, out, err = vlmtune("train", config, "optim.lr=0.02", "train.length=3")
    assert (code, err) == (0, "")
    assert "what trains, and how" in out and "lora r4" in out and "step 3/3" in out and "trained 3 steps" in out
    run = Path(yaml.safe_load(config.read_text())["run"])
    files = {p.name for p in run.iterdir()}
    assert files >= {
        "config.yaml", "environment.json", "assignment.json", "history.jsonl", "dropped.jsonl", "changed.jsonl",
        "report.html", "summary.json", "samples.json", "tensorboard", "checkpoints", "before.json",
    }  # fmt: skip
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optim"]["lr"] == 0.02 and resolved["train"]["length"] == 3
    history = read_history(run / "history.jsonl")
    assert [r["step"] for r in history if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in history if r["kind"] == "eval"] == [2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["samples"] == 12
    assert set(summary["metrics"]["val/caption"]["loss"]) == {"before", "after"}
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"best", "latest", "step_000003"}
    assert "<html" in (run / "report.html").read_text()
    first = (run / "first_batch.html").read_text()
    assert "What the model sees" in first and "with loss" in first and "image ×" in first


def test_train_refuses_another_config_and_restart_starts_over(config, run, vlmtune):
    code, _, err = vlmtune("train", config, "optim.lr=0.02")
    assert code == 1 and "holds a run of another config" in err and "--restart" in err and "Traceback" not in err
    assert vlmtune("train", config, "optim.lr=0.02", "train.length=3", "--restart")[0] == 0
    assert [r["step"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"] == [1, 2, 3]


def test_eval(run, vlmtune, tmp_path):
    """The metrics of the last checkpoint are those that the run itself reported; the base's are those before."""
    summary = json.loads((run / "summary.json").read_text())["metrics"]
    for checkpoint, moment in (("latest", "after"), ("base", "before")):
        code, out, err = vlmtune("eval", run, "--checkpoint", checkpoint, "--output", tmp_path / "metrics.json")
        assert (code, err) == (0, "") and "held-out data" in out
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        expected = {
            (f"loss/{place}" if metric == "loss" else f"{place}/{metric}"): pair[moment]
            for place, values in summary.items()
            for metric, pair in values.items()
        }
        assert {k: v for k, v in metrics.items() if k != "loss"} == pytest.approx(expected, rel=1e-6)


def test_predict(run, vlmtune, rows, tiny_folder):
    image = rows.parent / "0.png"
    for model in (run, tiny_folder("llava")):
        code, out, err = vlmtune("predict", image, "what is there", "--model", model, "--max-new-tokens", 4)
        assert (code, err) == (0, "") and out.endswith("\n")
    code, _, err = vlmtune("predict", rows.parent / "none.png", "what is there", "--model", run)
    assert code == 1 and "none.png does not exist" in err


def test_predict_reads_places_back_to_pixels(vlmtune, rows, tiny_folder, monkeypatch):
    """64 x 48 becomes 74 x 56 and then the middle 56 x 56: the model's middle is the picture's."""
    said = "<box>[[0,0,500,1000]]</box> <point>[[500,500]]</point> <click>[[1000,500]]</click> [1]"
    monkeypatch.setattr("vlmtune.use.reply", lambda *_: said)
    code, out, err = vlmtune("predict", rows.parent / "0.png", "what is there", "--model", tiny_folder("llava"))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        said,
        "box in pixels: 7.8, 0.0, 32.0, 48.0",
        "point in pixels: 32.0, 24.0",
        "click in pixels: 56.2, 24.0",
    ]


def test_a_region_outside_the_image_is_refused(vlmtune, rows, tiny_folder):
    asked = ("predict", rows.parent / "0.png", "what is at [region]", "--model", tiny_folder("llava"), "--region")
    assert vlmtune(*asked, "10,10,50,40", "--max-new-tokens", 1)[0] == 0
    code, _, err = vlmtune(*asked, "10,10,500,40")
    assert code == 1 and "sticks out of its image of 64x48 pixels" in err


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("what is at [region]", ["--region", "40,10,10,40"], "x2 is below x1"),
        ("what is at [region]", [], "no --region was given"),
        ("what is there", ["--region", "1,1,9,9"], "the prompt does not say [region]"),
        (" ", [], "the prompt is empty"),
        ("what is there", ["--checkpoint", "best"], "is not a run folder"),
    ],
)
def test_a_question_that_cannot_be_meant_is_refused(vlmtune, rows, tiny_folder, prompt, options, complaint):
    code, out, err = vlmtune("predict", rows.parent / "0.png", prompt, "--model", tiny_folder("llava"), *options)
    assert (code, out) == (1, "") and complaint in err


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on(config, run, vlmtune):
    newest = run / "checkpoints" / "step_000004"
    (newest / "trained.safetensors").write_bytes(b"nothing")
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "step 4/4" in out
    assert "trained.safetensors is damaged" in out and "is used" in out
    (run / "before.json").write_text("{")
    code, _, err = vlmtune("train", config)
    assert code == 1 and "before.json is damaged" in err and "delete it" in err
    (run / "before.json").unlink()
    assert vlmtune("train", config)[0] == 0


def test_inspect(config, vlmtune, tmp_path):
    code, out, err = vlmtune("inspect", config, "--sample", "s4", "--html", tmp_path / "page.html")
    assert (code, err) == (0, "") and "s4" in out and "page.html" in out.replace("\n", "")
    page = (tmp_path / "page.html").read_text()
    assert "s4" in page and "data:image/png;base64," in page
    assert vlmtune("inspect", config, "--html", tmp_path / "first.html")[0] == 0
    code, _, err = vlmtune("inspect", config, "--sample", "nobody", "--html", tmp_path / "no.html")
    assert code == 1 and "no sample with id 'nobody'" in err and not (tmp_path / "no.html").exists()


def test_export(run, vlmtune, tmp_path):
    """`best` by default."""
    code, out, err = vlmtune("export", run, tmp_path / "exported")
    assert (code, err) == (0, "") and "28 modules merged" in out
    AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    code, _, err = vlmtune("export", run, tmp_path / "exported")
    assert code == 1 and "exists" in err


def test_schema(run, vlmtune):
    """The schema knows every key of a resolved config, section by section, and allows no other."""
    code, out, err = vlmtune("schema")
    assert (code, err) == (0, "")
    schema = json.loads(out)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert schema["anyOf"] == [{"required": ["model", "data", "plan"]}, {"required": ["stages"]}]
    assert set(schema["properties"]) == {*resolved, "stages"}
    sections = {"data": "Data", "optim": "Optim", "train": "Train", "checkpoint": "Checkpoint", "evaluate": "Evaluate"}
    for key, definition in sections.items():
        assert set(schema["$defs"][definition]["properties"]) == set(resolved[key])
    assert all(d["additionalProperties"] is False for d in (schema, *schema["$defs"].values()))


def test_recipes(vlmtune):
    code, out, err = vlmtune("recipes")
    assert (code, err) == (0, "") and out.split() == recipe_names() and "embedded_base" in out.split()


def test_help_and_unknown_commands(vlmtune):
    code, out, _ = vlmtune("--help")
    assert code == 0 and all(
        name in out for name in ("train", "eval", "predict", "inspect", "export", "schema", "recipes")
    )
    assert vlmtune("fly")[0] == 2


def test_a_best_that_nothing_reports_stops_before_the_first_step(config, vlmtune):
    code, _, err = vlmtune("train", config, "checkpoint.best=val/vqa/iou")
    assert code == 1 and "checkpoint.best is 'val/vqa/iou', but evaluation reports loss" in err
    run = Path(yaml.safe_load(config.read_text())["run"])
    assert read_history(run / "history.jsonl") == [] and not (run / "checkpoints").exists()


def test_a_run_of_one_step_needs_no_other_warmup(config, vlmtune):
    code, _, err = vlmtune("train", config, "train.length=1", "optim.warmup=3%", "evaluate.every=null")
    assert (code, err) == (0, "")
    code, _, err = vlmtune("train", config, "train.length=1", "optim.warmup=1", "run=runs/other")
    assert code == 1 and "optim.warmup is 1 steps, but the run has only 1; shorten it, or write a share" in err


def test_scenes_of_other_sizes_are_not_taken_for_those_asked_for(vlmtune, tmp_path):
    folder = tmp_path / "scenes"
    assert vlmtune("scenes", folder, "--train-per-task", 2, "--val-per-task", 1)[0] == 0
    assert vlmtune("scenes", folder, "--train-per-task", 2, "--val-per-task", 1)[0] == 0
    for other in (("--train-per-task", 4), ("--train-per-task", 2, "--start", 1)):
        code, _, err = vlmtune("scenes", folder, "--val-per-task", 1, *other)
        assert code == 1 and "new-train is there already and holds other scenes than the" in err and "remove it" in err
    (tmp_path / "file").touch()
    code, _, err = vlmtune("scenes", tmp_path / "file")
    assert code == 1 and "cannot be written" in err and "choose another one" in err


@pytest.mark.parametrize("place", ["nowhere/m.json", ".", "/proc/m.json"])
def test_eval_asks_whether_it_can_write_before_it_works(run, vlmtune, place, monkeypatch):
    monkeypatch.setattr("vlmtune.use.evaluate_run", None)  # the work is not begun
    code, _, err = vlmtune("eval", run, "--output", place)
    assert code == 1 and err.startswith(f"error: --output {place}") and "Traceback" not in err


@pytest.mark.parametrize("place", ["nowhere/page.html", ".", "/proc/page.html"])
def test_inspect_asks_whether_it_can_write_before_it_works(config, vlmtune, place, monkeypatch):
    monkeypatch.setattr("vlmtune.view.inspect_sample", None)
    code, _, err = vlmtune("inspect", config, "--html", place)
    assert code == 1 and err.startswith(f"error: --html {place}") and "Traceback" not in err


def test_a_system_prompt_is_trained_with_and_predicted_with(config, vlmtune, tmp_path, monkeypatch):
    code, out, err = vlmtune("train", config, "data.system=vqa", "data.max_length=null", "evaluate.every=null")
    assert (code, err) == (0, "") and "system prompt vqa" in out and "note: system prompt vqa has" in out
    run = Path(yaml.safe_load(config.read_text())["run"])
    assert vlmtune("export", run, tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "vlmtune_export.json").read_text())["system"] == PROMPTS["vqa"]
    asked = []
    monkeypatch.setattr("vlmtune.use.reply", lambda model, encoder, sample, n: asked.append(sample.turns[0]) or "")
    image = next(Path(yaml.safe_load(config.read_text())["data"]["train"][0]["path"]).parent.glob("*.png"))
    assert vlmtune("predict", image, "what?", "--model", run)[0] == 0
    assert vlmtune("predict", image, "what?", "--model", run, "--system", "Be brief.")[0] == 0
    assert vlmtune("predict", image, "what?", "--model", tmp_path / "out")[0] == 0
    assert [turn.parts[-1].text for turn in asked] == [PROMPTS["vqa"], "Be brief.", "what?"]
    code, out, _ = vlmtune("prompts", "--model", tmp_path / "out")
    assert code == 0 and "vqa (" in out and PROMPTS["ocr"][:60] in out

"""The model card: front matter that the Hub reads, and text from data that stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from vlmtune.card import card, escaped, fenced, write_card
from vlmtune.config import dump_config, load_config
from vlmtune.models.efficientnet import EfficientNetLiteConfig

HOSTILE = "# [x](http://e.com) | <script>alert(1)</script>\n---\nbase_model: evil `a` **b** $c$"


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """(exported folder, run folder) with everything a card is made of."""
    run, export = tmp_path / "run", tmp_path / "my.model"
    run.mkdir()
    export.mkdir()
    (tmp_path / "t.jsonl").write_text("{}\n")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {"model": "owner/base-model", "run": str(run),
             "data": {"train": [{"path": str(tmp_path / "t.jsonl")}, {"path": "hub:owner/data"}],
                      "eval": {"old": [{"path": str(tmp_path / "t.jsonl")}]}, "system": "Say `x`\n```\nand stop."},
             "plan": [{"match": "*", "train": "lora"}]}
        )
    )  # fmt: skip
    (run / "config.yaml").write_text(dump_config(load_config(str(tmp_path / "c.yaml"))))
    (run / "environment.json").write_text(
        json.dumps({"vlmtune": "0.1.0", "python": "3.11", "packages": {"torch": "2.13"}, "device": "cpu",
                    "precision": "fp32"})
    )  # fmt: skip
    (run / "summary.json").write_text(
        json.dumps({"metrics": {"old/vqa": {"exact_match": {"before": 0.5, "after": 0.75}}}, "steps": 10,
                    "total_steps": 10, "samples": 1600, "train_seconds": 65.0})
    )  # fmt: skip
    row = {"part": "language", "method": "lora r16", "parameters": 100, "trainable": 10, "lr": 1e-4}
    (run / "assignment.json").write_text(json.dumps([row]))
    (run / "data.json").write_text(
        json.dumps([{"place": "train", "name": HOSTILE, "limit": None, "files": 1, "bytes": 3, "sha256": "abc",
                     "whole": True}])
    )  # fmt: skip
    (export / "vlmtune_export.json").write_text(json.dumps({"checkpoint": "step_000010", "system": HOSTILE}))
    return export, run


def validated(run: Path, **changed) -> None:
    change = {"before": 0.5, "after": 0.7, "low": 0.1, "high": 0.3, "p": 0.001, "count": 40}
    record = {
        "format": 1, "verdict": "fail", "checkpoint": "step_000010", "skipped": ["speed"], "limit": 40,
        "findings": [
            {"section": "diversity", "level": "fail", "what": "replies differ", "evidence": HOSTILE, "remedy": "mend"},
            {"section": "task", "level": "pass", "what": "new is learned", "evidence": "0.1", "remedy": ""},
        ],
        "figures": {
            "comparisons": [{"group": "old", "task": "vqa", "metric": "exact_match", "telling": True, **change}],
            "quantised": [{"storage": "nf4", "bytes": 2**20, "full_bytes": 2**22, "loss": change, "score": change}],
        },
        **changed,
    }  # fmt: skip
    (run / "validate.json").write_text(json.dumps(record))


def test_the_hub_reads_it(folders):
    """huggingface_hub is the second source: it parses the front matter and the results."""
    export, run = folders
    read = ModelCard(write_card(export, run).read_text())
    assert read.data.base_model == "owner/base-model" and read.data.pipeline_tag == "image-text-to-text"
    assert read.data.datasets == ["owner/data"] and read.data.tags == ["vlmtune", "lora"]
    (result,) = read.data.eval_results
    assert (read.data.model_name, result.metric_type, result.metric_value) == ("my.model", "exact_match", 0.75)
    assert read.text.lstrip().startswith("# my.model\n")


def test_a_tower_of_our_own_is_imported_first(folders):
    export, run = folders
    line = "import vlmtune.models.efficientnet  # its vision tower"
    for kind, is_there in ((EfficientNetLiteConfig.model_type, True), ("siglip_vision_model", False)):
        (export / "config.json").write_text(json.dumps({"vision_config": {"model_type": kind}}))
        assert (line in card(export, run, "m")) == is_there


def test_text_from_data_stays_text(folders):
    export, run = folders
    validated(run)
    text = card(export, run, "m")
    assert "<script>" not in text and "[x](http" not in text and "**b**" not in text
    assert text.count("\n---\n") == 1 and text.startswith("---\n"), "the front matter ends once"
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/base-model"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# m", *(f"## {name}" for name in (
        "Use", "Evaluation", "Known issues", "Training", "Data", "Versions", "Config"))]  # fmt: skip
    table = next(line for line in text.splitlines() if line.startswith("| train |"))
    assert table.replace("\\|", "").count("|") == 6, "a bar in a name is no border of a cell"


def test_known_issues_are_those_of_this_checkpoint(folders):
    export, run = folders
    assert "was not run on this checkpoint" in card(export, run, "m")
    validated(run)
    text = card(export, run, "m")
    assert "- **fail**, diversity: replies differ: " in text and "1 checks of `vlmtune validate` passed." in text
    assert "Left out: speed." in text and "At most 40 samples" in text and "No safety probe was run." in text
    assert "| old | vqa | exact\\_match | 0.500 | 0.700 | +0.200 (+0.100 to +0.300) | 40 |" in text
    assert "| nf4 | 1.0 MiB |" in text
    validated(run, checkpoint="step_000005")
    assert "was not run on this checkpoint" in card(export, run, "m")


def test_no_folder_of_this_machine_is_in_it(folders, tmp_path):
    export, run = folders
    validated(run)
    text = card(export, run, "m")
    assert str(tmp_path) not in text and "path: t.jsonl" in text and "hub:owner/data" in text


def test_a_run_that_measured_nothing(tmp_path, folders):
    export, run = folders
    for name in ("summary.json", "environment.json", "data.json", "assignment.json"):
        (run / name).unlink()
    text = card(export, run, "m")
    assert "how good it is was not measured" in text and text.count("Not recorded.") == 2


def test_escapes():
    assert escaped("a|b\nc_d") == "a\\|b c\\_d"
    assert escaped("<b>&") == "&lt;b>&amp;"
    block = fenced("x\n````\ny")
    assert block.splitlines()[0] == "`````" and block.splitlines()[-1] == "`````"

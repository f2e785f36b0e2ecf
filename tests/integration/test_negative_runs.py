"""Negatives through `vlmtune train`: counted per kind in the log, scored per kind, for scenes and for files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from training_setup import png

from vlmtune.observe.log import read_history

TRAIN = {"length": 4, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
PLAN = [{"match": "language", "train": "lora", "rank": 4}, {"match": "*", "train": "frozen"}]


def run_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"])


def test_kinds_of_negatives_are_counted_and_scored(write_config, vlmtune):
    train = [{"scenes": "base", "task": task, "negatives": {}} for task in ("grounding", "referring")]
    held_out = [{"scenes": "base", "task": "grounding", "split": "val", "limit": 2, "negatives": {}}]
    data = {"train": train, "eval": {"val": held_out}, "workers": 0}
    config = write_config("run", 4, model="embedded", data=data, plan=PLAN, train=TRAIN, evaluate={"max_new_tokens": 8})
    code, _, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    last = read_history(run_of(config) / "history.jsonl")[-1]
    names = {"grounding": ("", " hard", " random"), "referring": ("", " hard", " random", " background", " confirmed")}
    sources = {f"scenes/base/{task}/train{kind}" for task, kinds in names.items() for kind in kinds}
    summary = json.loads((run_of(config) / "summary.json").read_text())
    assert set(summary["sources"]) == sources and sum(summary["sources"].values()) == 32
    assert set(summary["metrics"]) == {"val/grounding", "val/grounding_hard", "val/grounding_random"}
    assert last["kind"] == "eval"


def test_negatives_of_a_file(write_config, vlmtune, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    boxes = {"cat": [2, 2, 20, 20], "dog": [30, 20, 60, 44], "cow": [2, 26, 20, 44]}
    lines = [
        {"id": name, "task": "grounding", "image": "a.png", "question": f"Find the {name}.", "boxes": [boxes[name]],
         "meta": {"objects": [{"name": n, "box": boxes[n], "kind": "animal"} for n in boxes if n != other]}}
        for name, other in (("cat", "dog"), ("dog", "cow"), ("cow", "cat"))
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": [{"path": str(file), "negatives": {"ratio": 1, "random": 0}}], "workers": 0}
    config = write_config("run", 4, data=data)
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "hard negatives of" in out
    last = read_history(run_of(config) / "history.jsonl")[-1]
    assert set(last["sources"]) == {"rows.jsonl", "rows.jsonl hard"} and min(last["sources"].values()) > 0
    page = tmp_path / "page.html"
    assert vlmtune("inspect", config, "--sample", "cat/hard", "--html", page)[0] == 0 and page.is_file()


@pytest.mark.parametrize(
    ("negatives", "complaint"),
    [
        ({"ratio": -1}, "ratio is -1 at some time"),
        ({"ratios": 1}, "unknown key data.train.0.negatives.ratios (did you mean ratio?)"),
        ({"what": "What is it?"}, "not exactly once"),
    ],
)
def test_negatives_that_cannot_be_are_refused(write_config, vlmtune, negatives, complaint):
    data = {"train": [{"scenes": "base", "task": "grounding", "negatives": negatives}], "workers": 0}
    code, _, err = vlmtune("train", write_config("run", 3, data=data))
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err


def test_a_ratio_beside_sampling_by_task_is_refused(write_config, vlmtune):
    train = [{"scenes": "base", "task": "grounding", "negatives": {"ratio": 2}}]
    config = write_config("run", 3, data={"train": train, "sampling": {"by": "temperature"}, "workers": 0})
    code, _, err = vlmtune("train", config)
    assert code == 1 and "leave out the ratio of negatives" in err

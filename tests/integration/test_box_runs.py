"""loss.box through `vlmtune train`: on the embedded model, logged, lower with training; refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlmtune.observe.log import read_history

SCENES = {"train": [{"scenes": "base", "task": "grounding"}, {"scenes": "base", "task": "caption"}], "workers": 0}


def run_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"])


def test_a_box_loss_trains_is_printed_and_logged(write_config, vlmtune):
    plan = [{"match": "language", "train": "lora", "rank": 4}, {"match": "*", "train": "frozen"}]
    train = {"length": 3, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
    losses = {}
    for name, box in {"with": {"l1": 1, "giou": 2}, "without": None}.items():
        loss = {"box": box, "balance": {"by": "uncertainty"}}
        config = write_config(name, 3, model="embedded", data=SCENES, plan=plan, train=train, loss=loss)
        code, out, err = vlmtune("train", config)
        assert (code, err) == (0, "")
        assert ("1 × L1 + 2 × (1 - GIoU)" in out.replace("\n", " ")) == (box is not None)
        losses[name] = read_history(run_of(config) / "history.jsonl")
    assert all(set(record["loss_terms"]) == {"box"} and record["loss_terms"]["box"] > 0 for record in losses["with"])
    assert all(record["loss_terms"] == {} for record in losses["without"])
    assert losses["with"][0]["loss"] == pytest.approx(losses["without"][0]["loss"], rel=1e-6)
    assert losses["with"][2]["loss"] != losses["without"][2]["loss"], "the term moves the weights"


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        ({"box": {}}, "loss.box reads boxes from coordinate tokens, but this model writes them as"),
        ({"box": {"l1": 0, "giou": 0}}, "l1 and giou are both 0"),
        ({"box": {"l1": -1}}, "loss.box.l1"),
        ({"box": {}, "weights": {"box": [[0, 1], [0.5, 0]]}}, "keep weights.box above 0"),
    ],
)
def test_a_box_loss_that_cannot_be_is_refused(write_config, vlmtune, loss, complaint):
    config = write_config("run", 3, loss=loss)
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
    assert not run_of(config).exists()

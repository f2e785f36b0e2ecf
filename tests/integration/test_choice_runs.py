"""Multiple choice in a run: the metric before, after and by `vlmtune eval`, and what decides which checkpoint is best
(SPEC G6)."""

from __future__ import annotations

import json

from training_setup import png


def test_multiple_choice_is_learned_measured_and_decides(write_config, tmp_path, vlmtune):
    """The answer is always the same of three, so that a few steps suffice."""
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    lines = [
        {"id": f"s{n}", "image": f"{n}.png", "question": "what is there", "answer": "blue", "task": "colour",
         "meta": {"choices": ["red circle", "blue", "one"]}}
        for n in range(8)
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "t.jsonl")}
    config = write_config(
        "run", 8, data={"train": [source], "eval": {"held": [source]}, "workers": 0},
        checkpoint={"every": 4, "best": "held/colour/choice_accuracy"},
        evaluate={"every": "4 steps", "generate": False},
    )  # fmt: skip
    code, out, err = vlmtune("train", config)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    scores = summary["metrics"]["held/colour"]["choice_accuracy"]
    assert scores["before"] in (0.0, 1.0) and scores["after"] == 1.0 and summary["best"]["value"] == 1.0
    code, out, _ = vlmtune("eval", tmp_path / "run", "--checkpoint", "best", "--output", tmp_path / "m.json")
    assert code == 0 and json.loads((tmp_path / "m.json").read_text())["held/colour/choice_accuracy"] == 1.0
    code, _, err = vlmtune("train", config, "evaluate.choices={colour: [red, one]}", f"run={tmp_path / 'other'}")
    assert code == 0, "the rows' own choices come first"
    lines[3]["meta"]["choices"] = ["red", "one"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = vlmtune("train", config, f"run={tmp_path / 'third'}")
    assert code == 1 and "t.jsonl:4 (sample s3): its answer 'blue' is none of the choices" in " ".join(err.split())

"""Chosen metrics through the commands: before, during and after training, on the page, by `vlmtune eval`; and refused
before anything is trained (SPEC H3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_setup import png

from vlmtune.observe.log import read_history

ANSWERS = ["red circle", "blue square", "one", "two three"]
CHOSEN = {"vqa": ["vqa_accuracy", "bleu", "cider"], "caption": ["rouge_l", "chrf"]}


def rows(folder: Path, answers: list[str] | None, task: str = "vqa") -> dict:
    """A source of eight questions, each with these ten accepted answers and its own."""
    for n in range(8):
        (folder / f"{n}.png").write_bytes(png(n))
    lines = []
    for n in range(8):
        meta = {} if answers is None else {"answers": [*answers, *[ANSWERS[n % 4]] * (10 - len(answers))]}
        lines.append({"id": f"s{n}", "image": f"{n}.png", "question": "what is there", "answer": ANSWERS[n % 4],
                      "task": task, "meta": meta})  # fmt: skip
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(folder / f"{task}.jsonl")}


@pytest.fixture
def config(write_config, tmp_path):
    def write(name: str, metrics: dict, sources: list[dict], **evaluate) -> Path:
        return write_config(
            name, 3, data={"train": sources, "eval": {"held": sources}, "workers": 0},
            checkpoint={"every": 1, "best": "held/vqa/cider"},
            evaluate={"every": "1 steps", "metrics": metrics, "max_new_tokens": 6, **evaluate},
        )  # fmt: skip

    return write


def test_chosen_metrics_are_measured_wherever_metrics_are(config, tmp_path, vlmtune):
    sources = [rows(tmp_path, ["a red circle", "green"]), rows(tmp_path, None, "caption")]
    code, _, err = vlmtune("train", config("run", CHOSEN, sources))
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())["metrics"]
    assert {task: [*summary[f"held/{task}"]] for task in CHOSEN} == {
        task: ["loss", *names] for task, names in CHOSEN.items()
    }
    assert all({"before", "after"} == set(pair) for values in summary.values() for pair in values.values())
    records = [record for record in read_history(run / "history.jsonl") if record["kind"] == "eval"]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(list(record["metrics"][f"held/{task}"]) == CHOSEN[task] for record in records for task in CHOSEN)
    assert "vqa accuracy" in (run / "report.html").read_text() and (run / "checkpoints" / "best").exists()
    code, out, _ = vlmtune("eval", run, "--output", tmp_path / "m.json")
    assert code == 0 and "rouge_l" in out
    measured = json.loads((tmp_path / "m.json").read_text())
    assert measured["held/vqa/cider"] == pytest.approx(summary["held/vqa"]["cider"]["after"])
    assert {name for name in measured if not name.startswith("loss")} == {
        f"held/{task}/{name}" for task, names in CHOSEN.items() for name in names
    }


@pytest.mark.parametrize(
    ("answers", "metrics", "said"),
    [
        (["x"], {"caption": ["f1"]}, "evaluate.metrics.caption: no sample of data.eval has this task (there is vqa)"),
        (None, {"vqa": ["vqa_accuracy"]}, "vqa.jsonl:1 (sample s0): vqa_accuracy needs meta.answers"),
        (["x"], {"vqa": ["mean_iou"]}, "mean_iou of task 'vqa': no reply of its 8 held-out samples has a box"),
        (["x"], {"vqa": ["mask_oiou"]}, "mask_oiou of task 'vqa' needs a mask head, but this run trains none"),
        (["x"], {"vqa": ["rougeL"]}, "there is no metric 'rougeL' (did you mean rouge_l?)"),
        ([7], {"vqa": ["exact_match"]}, "vqa.jsonl:1 (sample s0): meta.answers is a list of at least one text"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_training(config, tmp_path, vlmtune, answers, metrics, said):
    """By `check` too, and nothing is written."""
    path = config("run", metrics, [rows(tmp_path, answers)])
    for command in (["train"], ["check", "--no-data"]):
        code, out, err = vlmtune(*command, path)
        assert code == 1 and said in " ".join((out + err).split()), out + err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_limit_counts_in_what_can_be_measured(config, tmp_path, vlmtune):
    """CIDEr has eight samples before and after, but only one during the training."""
    path = config("run", {"vqa": ["cider"]}, [rows(tmp_path, ["x"])], limit=1)
    code, _, err = vlmtune("train", path)
    assert code == 1 and "there is only one held-out sample" in " ".join(err.split())


def test_rows_that_changed_after_training_are_refused_by_eval(config, tmp_path, vlmtune):
    """`data.eval` does not belong to what a run is made of, so `vlmtune eval` looks again."""
    source = rows(tmp_path, ["x"])
    path = config("run", {"vqa": ["vqa_accuracy"]}, [source], every=None, limit=None)
    code, _, err = vlmtune("train", path, "checkpoint.best=loss", "train.length=3")
    assert code == 0, err
    rows(tmp_path, None)
    code, _, err = vlmtune("eval", tmp_path / "run")
    assert code == 1 and "vqa.jsonl:1 (sample s0): vqa_accuracy needs meta.answers" in " ".join(err.split())

"""`vlmtune check` and the quick check of `vlmtune train`, as a user types them (SPEC H1)."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from training_setup import png

import vlmtune.check as check_module
from vlmtune.build import best_device
from vlmtune.config import load_config
from vlmtune.prepare import largest_micro_batch, prepare
from vlmtune.start import MIB

SECTIONS = ["machine", "plan", "model", "data", "start", "step", "checkpoint"]


def findings(out: str) -> list[dict]:
    return json.loads(out)


def of_level(out: str, level: str) -> list[tuple[str, str, str]]:
    return [(f["section"], f["what"], f["evidence"]) for f in findings(out) if f["level"] == level]


def test_a_run_that_can_go_well(write_config, tmp_path, vlmtune, rows):
    held_out = {
        "data": {"train": [{"path": str(rows)}], "eval": {"val": [{"path": str(rows), "limit": 2}]}, "workers": 0}
    }
    config = write_config("run", 8, **held_out)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = vlmtune("check", config, "--no-data", "optim.lr=1e-3")
    assert code == 0, out + err
    assert "0 fail" in out and "a checkpoint gives the same model back" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left behind"


def test_json_has_every_section_in_order(write_config, vlmtune):
    code, out, _ = vlmtune("check", write_config("run", 8), "--json")
    assert code == 0
    assert list(dict.fromkeys(finding["section"] for finding in findings(out))) == SECTIONS
    (step,) = [f for f in findings(out) if f["what"] == "the largest batch goes forward and backward"]
    assert step["evidence"].startswith("2 samples of ") and "projector" in step["evidence"]


def test_the_largest_batch_is_of_the_longest_samples(write_config, vlmtune, rows):

    made = prepare(load_config(str(write_config("run", 3))), best_device(), Console(quiet=True))
    source = made.sources[0]
    lengths = {source[row].id: len(made.encoder.encode(source[row])) for row in range(source.size)}
    batch = largest_micro_batch(made)
    assert sorted(lengths[name] for name in batch.sample_ids) == sorted(lengths.values())[-2:]


def test_bad_rows_fail_all_at_once(write_config, tmp_path, vlmtune):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "1.png").write_bytes(b"")
    lines = [{"id": f"s{n}", "image": f"{n}.png", "question": "what", "answer": "red"} for n in (0, 1, 2, 7)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = write_config("run", 3, data={"train": [{"path": str(tmp_path / "t.jsonl")}], "workers": 0})
    code, out, _ = vlmtune("check", config, "--json")
    assert code == 1
    failed = of_level(out, "fail")
    assert [what for _, what, _ in failed] == ["an image file is not there", "an image has zero bytes"]
    assert findings(out)[-1]["section"] == "data", "nothing after it is tried"
    code, out, _ = vlmtune("check", config, "--json", "data.on_bad_row=drop", "train.batch_size=2")
    assert (
        code == 0 and "left out" in dict((what, e) for _, what, e in of_level(out, "warn"))["an image has zero bytes"]
    )


@pytest.mark.parametrize(
    ("override", "section", "said"),
    [
        ("data.train.0.path=nowhere.jsonl", "plan", "data file nowhere.jsonl does not exist"),
        ("plan.0.match=visoin", "plan", "no rule covers vision"),
        ("optim.warmup=50", "plan", "optim.warmup is 50 steps, but the run has only 8"),
        ("run=/proc/nowhere/run", "machine", "cannot be written"),
        ("data.max_length=8", "data", "exceed data.max_length 8"),
    ],
)
def test_what_cannot_work_fails_in_the_first_section_that_sees_it(write_config, vlmtune, override, section, said):
    code, out, _ = vlmtune("check", write_config("run", 8), "--json", override)
    ((where, _, evidence),) = of_level(out, "fail")
    assert code == 1 and where == section and said in evidence


def test_a_checkpoint_that_does_not_come_back_fails(write_config, vlmtune, monkeypatch):
    before = check_module._logits
    calls = []

    def logits(*arguments):
        calls.append(1)
        return before(*arguments) * len(calls)

    monkeypatch.setattr(check_module, "_logits", logits)
    code, out, _ = vlmtune("check", write_config("run", 8), "--json", "--no-data")
    ((section, what, _),) = of_level(out, "fail")
    assert code == 1 and (section, what) == ("checkpoint", "a checkpoint gives the same model back")


def test_a_model_that_does_not_fit_is_refused_by_check_and_train(write_config, tmp_path, vlmtune, monkeypatch):
    monkeypatch.setattr("vlmtune.start.memory_there", lambda device: 1 * MIB)
    config = write_config("run", 3)
    code, out, _ = vlmtune("check", config, "--json", "--no-data")
    ((_, what, evidence),) = of_level(out, "fail")
    assert code == 1 and what == "memory suffices" and "of 1" in evidence
    code, _, err = vlmtune("train", config)
    assert code == 1 and "check: memory suffices: no, predicted" in err and not (tmp_path / "run").exists()
    assert vlmtune("train", config, "--no-check")[0] == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["checked"] is False
    assert json.loads((tmp_path / "run" / "start.json").read_text()) == []


def test_train_says_what_is_unusual_and_records_it(write_config, tmp_path, vlmtune):
    code, out, _ = vlmtune("train", write_config("run", 3), "optim.clip=null")
    assert code == 0 and "check: warn: gradients are clipped: no limit" in out and "figures are as usual" in out
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["checked"] is True
    start = json.loads((tmp_path / "run" / "start.json").read_text())
    assert "gradients are clipped" in {finding["what"] for finding in start if finding["level"] == "warn"}


def test_every_stage_of_a_chain_is_checked(chain, vlmtune, tmp_path):
    code, out, _ = vlmtune("check", chain("c"), "--json", "--no-data")
    assert code == 0 and list(dict.fromkeys(f["stage"] for f in findings(out))) == ["align", "tasks", "instruct"]
    assert not (tmp_path / "c").exists()
    code, out, _ = vlmtune("check", chain("c"), "--json", "--no-data", "stages.1.optim.warmup=70")
    assert code == 1 and [f["stage"] for f in findings(out) if f["level"] == "fail"] == ["tasks"]

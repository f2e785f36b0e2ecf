"""data.on_bad_row through the commands: stop at a bad row, or leave out all of them and say so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training_setup import write_data

BAD = {2: "truncated image", 5: "no reply", 7: "no JSON", 9: "image missing"}


@pytest.fixture
def bad_rows(tmp_path) -> Path:
    path = write_data(tmp_path / "data", 12)
    lines = path.read_text().splitlines()
    picture = path.parent / "2.png"
    picture.write_bytes(picture.read_bytes()[:2000])
    row = json.loads(lines[5])
    row["messages"][-1]["content"] = ""
    lines[5], lines[7] = json.dumps(row), lines[7][:20]
    (path.parent / "9.png").unlink()
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(write_config, path: Path, **data) -> Path:
    groups = {"train": [{"path": str(path)}], "eval": {"val": [{"path": str(path)}]}, "workers": 0}
    return write_config("run", 4, data=groups | data, evaluate={"generate": False})


def test_the_first_bad_row_stops(bad_rows, write_config, vlmtune):
    code, _, err = vlmtune("train", config_of(write_config, bad_rows))
    assert code == 1 and "train.jsonl:3" in err and "2.png cannot be decoded" in err


@pytest.mark.parametrize("max_length", [2048, None])
def test_bad_rows_are_left_out_and_named(bad_rows, write_config, vlmtune, max_length):
    config = config_of(write_config, bad_rows, on_bad_row="drop", max_length=max_length)
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    assert "data: train.jsonl: 4 of 12 rows cannot be used and are left out (" in out
    assert "data: val/train.jsonl: 4 of 12 rows" in out
    run = config.with_suffix("")
    gone = [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]
    assert [row["source"] for row in gone] == ["train.jsonl"] * 4 + ["val/train.jsonl"] * 4
    assert [int(re.findall(r"\d+$", row["origin"])[0]) for row in gone[:4]] == [n + 1 for n in BAD]
    reasons = " | ".join(row["reason"] for row in gone[:4])
    for part in ("2.png", "reply", "JSON", "9.png"):
        assert part in reasons
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] == 16

    code, _, err = vlmtune("inspect", config, "--sample", gone[0]["id"])
    assert code == 1 and "is left out" in err and "2.png" in err


def test_a_run_goes_on_only_with_the_same_rows(bad_rows, write_config, vlmtune):
    config = config_of(write_config, bad_rows, on_bad_row="drop")
    assert vlmtune("train", config)[0] == 0
    assert vlmtune("train", config)[0] == 0  # finished, and the same
    source = bad_rows.parent / "0.png"
    (bad_rows.parent / "9.png").write_bytes(source.read_bytes())
    code, _, err = vlmtune("train", config)
    assert code == 1 and "dropped.jsonl would change" in err and "--restart" in err
    code, out, _ = vlmtune("train", config, "--restart")
    assert code == 0 and "3 of 12 rows" in out


def test_nothing_usable_is_refused(bad_rows, write_config, vlmtune):
    for picture in bad_rows.parent.glob("*.png"):
        picture.unlink()
    lines = bad_rows.read_text().splitlines()
    bad_rows.write_text("\n".join(line for n, line in enumerate(lines) if n != 3) + "\n")  # row 3 has no image
    code, _, err = vlmtune("train", config_of(write_config, bad_rows, on_bad_row="drop"))
    assert code == 1 and "no row can be used (first: " in err and "check-data" in err

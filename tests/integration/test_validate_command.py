"""`vlmtune validate` as a user types it (SPEC H3)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from training_setup import IN_FULL, png

COLOURS = ("red", "blue", "green", "yellow")


def write_rows(folder: Path, name: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if "image" in row:
            (folder / row["image"]).write_bytes(png(int(row["image"].split(".")[0])))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_level(out: str, level: str) -> dict[str, str]:
    return {f["what"]: f["evidence"] for f in json.loads(out) if f["level"] == level}


@pytest.fixture
def trained(write_config, tmp_path, vlmtune):
    """A run that learned that what is there is blue; `sure` holds that out, `words` something it never saw."""
    same = [
        {"id": f"s{n}", "image": f"{n}.png", "question": "what is there", "answer": "blue", "task": "colour",
         "meta": {"objects": [{"name": COLOURS[n % 3], "box": [4, 6, 40, 30]}, {"name": "box", "box": [5, 5, 9, 9]}]}}
        for n in range(12)
    ]  # fmt: skip
    source = {"path": str(write_rows(tmp_path / "rows", "same", same))}
    config = write_config(
        "run", 12, data={"train": [source], "eval": {"sure": [source]}, "workers": 0},
        plan=IN_FULL, checkpoint={"every": 12}, evaluate={"batch_size": 4, "max_new_tokens": 12},
    )  # fmt: skip
    code, out, err = vlmtune("train", config)
    assert code == 0, out + err
    return tmp_path / "run"


def test_first(trained, vlmtune):
    code, out, err = vlmtune("validate", trained)
    print(out, err)
    assert 0

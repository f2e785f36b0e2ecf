"""Samples above data.max_length and images above data.max_pixels, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from training_setup import png
from transformers import AutoProcessor
from typer.testing import CliRunner

from vlmtune.cli import app

LONG = "red circle. " * 60


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """a: short; b: two rounds that are too long together; c: a reply of many sentences; d: nothing can be cut."""
    (tmp_path / "0.png").write_bytes(png(0))
    image = {"type": "image", "image": "0.png"}

    def row(id: str, *texts: str) -> dict:
        roles = ("user", "assistant") * (len(texts) // 2)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        messages[0]["content"] = [image, {"type": "text", "text": texts[0]}]
        return {"id": id, "messages": messages}

    rows = [
        row("a", "what is there", "a red circle"),
        row("b", "red " * 100, "blue", "what is there", "a red circle"),
        row("c", "what is there", LONG),
        row("d", "red " * 400, "a red circle"),
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(write_config, data):
    def write(**wish) -> Path:
        section = {"train": [{"path": str(data)}], "workers": 0, "max_length": 120, "reply_reserve": 8, **wish}
        return write_config("run", 3, data=section)

    return write


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    output = result.output if result.exception is None else f"{result.output} {result.exception}"
    return result.exit_code, " ".join(output.split())  # the console breaks lines where it likes


def rows_of(config: Path, name: str) -> dict[str, dict]:
    folder = Path(yaml.safe_load(config.read_text())["run"])
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return {row["id"]: row for row in rows}


def test_error_stops_before_anything_is_written(config):
    path = config()
    code, output = run("train", path)
    assert code != 0 and "3 of 4 samples exceed 120 tokens" in output and "(sample b)" in output
    assert "oldest turns dropped (1)" in output and "reply cut (1)" in output and "dropped whole (1)" in output
    assert not Path(yaml.safe_load(path.read_text())["run"]).exists()


def test_trim_writes_down_what_it_did_and_trains_on_the_rest(config):
    path = config(on_overlong="trim")
    code, output = run("train", path)
    assert code == 0, output
    assert "3 of 4 samples exceed 120 tokens" in output
    dropped, changed = rows_of(path, "dropped.jsonl"), rows_of(path, "changed.jsonl")
    assert set(dropped) == {"d"} and set(changed) == {"b", "c"}
    assert [c["action"] for c in changed["b"]["changes"]] == ["turns"]
    assert [c["action"] for c in changed["c"]["changes"]] == ["reply"]
    assert all(row["tokens"] > 120 >= row["tokens_left"] for row in changed.values())
    assert dropped["d"]["origin"].endswith("long.jsonl:4") and "120 are allowed" in dropped["d"]["reason"]
    page = Path(yaml.safe_load(path.read_text())["run"], "first_batch.html").read_text()
    assert "long.jsonl: tokens per sample" in page


def test_drop_leaves_all_of_them_out(config):
    path = config(on_overlong="drop")
    code, output = run("train", path)
    assert code == 0, output
    assert set(rows_of(path, "dropped.jsonl")) == {"b", "c", "d"} and not rows_of(path, "changed.jsonl")
    summary = json.loads(Path(yaml.safe_load(path.read_text())["run"], "summary.json").read_text())
    assert summary["sources"] == {"long.jsonl": 12}


def test_inspect_shows_what_was_cut_and_the_lengths(config, tmp_path):
    path = config(on_overlong="trim")
    page = tmp_path / "page.html"
    code, output = run("inspect", path, "--sample", "c", "--html", page)
    assert code == 0, output
    html = page.read_text()
    assert "Last reply cut after a sentence; its end-of-turn token carries no loss." in html
    assert "long.jsonl: tokens per sample" in html and 'class="over"' in html and 'class="limit"' in html
    code, output = run("inspect", path, "--sample", "d", "--html", page)
    assert code != 0 and "is left out" in output and "data.max_length is 120" in output


def test_a_limit_of_pixels_trains_exports_and_predicts_the_same(write_config, rows, tiny_folder, tmp_path):
    limit = 28 * 28 * 4
    plan = [{"match": part, "train": "full"} for part in ("vision", "projector", "language", "embed", "lm_head")]
    path = write_config(
        "run", 3, model=str(tiny_folder("qwen2_5_vl")), plan=plan,
        data={"train": [{"path": str(rows)}], "workers": 0, "max_pixels": limit, "min_pixels": 28 * 28},
    )  # fmt: skip
    code, output = run("train", path)
    assert code == 0, output
    folder = yaml.safe_load(path.read_text())["run"]
    code, output = run("export", folder, tmp_path / "out")
    assert code == 0, output
    size = AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (28 * 28, limit)


def test_a_limit_that_the_family_has_not_is_refused(config):
    code, output = run("train", config(max_pixels=10_000, max_length=None))
    assert code != 0 and "have no effect on this model" in output


def test_trim_without_a_limit_is_refused(config):
    code, output = run("train", config(on_overlong="trim", max_length=None))
    assert code != 0 and "on_overlong: trim needs a max_length" in output

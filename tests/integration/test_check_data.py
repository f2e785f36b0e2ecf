"""`vlmtune check-data` as a user types it: exit code, what is printed, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_setup import png
from typer.testing import CliRunner

from vlmtune.cli import app

EVIL = "<script>alert(1)</script>"


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check-data", *map(str, arguments)])
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, **fields) -> dict:
    return {
        "id": f"s{number}",
        "image": f"{number}.png",
        "question": f"what {number}",
        "answer": "red circle",
        **fields,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def sections(train: Path, val: Path | None = None, **wish) -> dict:
    held_out = {} if val is None else {"eval": {"held": [{"path": str(val)}]}}
    return {"data": {"train": [{"path": str(train)}], "workers": 0, **held_out, **wish}}


def test_clean_data(write_config, folder):
    train, val = write(folder / "t.jsonl", [row(n) for n in range(4)]), write(folder / "v.jsonl", [row(4), row(5)])
    code, output = run(write_config("run", 1, **sections(train, val)))
    assert code == 0, output
    assert "6 samples of 2 sources: 0 errors, 0 warnings" in output
    out = folder / "run-data-check"
    assert {path.name for path in out.iterdir()} == {"findings.jsonl", "summary.json", "report.html"}
    assert (out / "findings.jsonl").read_text() == ""
    summary = json.loads((out / "summary.json").read_text())
    assert [(s["name"], s["split"], s["rows"], s["samples"], s["images"]) for s in summary["sources"]] == [
        ("t.jsonl", "train", 4, 4, 4), ("held/v.jsonl", "eval/held", 2, 2, 2),
    ]  # fmt: skip
    assert summary["sources"][0]["width"] == {
        "min": 64, "p5": 64, "p50": 64, "p95": 64, "p99": 64, "max": 64, "mean": 64.0,
    }  # fmt: skip
    assert summary["rows"] == 6 and summary["seconds"] > 0 and summary["findings"] == []
    page = (out / "report.html").read_text()
    assert "Nothing was found." in page and "t.jsonl: tokens per sample" in page
    assert not (folder / "run").exists(), "the run folder belongs to the training"


def test_warnings_alone_are_no_failure(write_config, folder):
    train = write(folder / "t.jsonl", [row(0), row(0, id="again")])
    code, output = run(write_config("run", 1, **sections(train)))
    assert code == 0 and "duplicate_row" in output and "0 errors, 1 warning;" in output


@pytest.fixture
def bad(write_config, folder) -> Path:
    rows = [row(0), row(1, id=EVIL, answer=""), row(2, image=f"{EVIL}.png"), row(3, answer="red " * 3000), row(4)]
    (folder / "4.png").write_bytes(png(4)[:500])
    train, val = write(folder / "t.jsonl", rows), write(folder / "v.jsonl", [row(0, id="v0"), row(5)])
    return write_config("run", 1, **sections(train, val))


def test_bad_data_is_counted_named_and_fails(bad, folder):
    out = folder / "out"
    code, output = run(bad, "--output", out)
    assert code == 1 and "7 samples of 2 sources: 5 errors, 0 warnings" in output
    lines = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    assert [(line["code"], line["source"], line["row"], line["id"]) for line in lines] == [
        ("reply_empty", "t.jsonl", 1, EVIL),
        ("image_missing", "t.jsonl", 2, "s2"),
        ("too_long", "t.jsonl", 3, "s3"),
        ("image_corrupt", "t.jsonl", 4, "s4"),
        ("leak", "held/v.jsonl", 0, "v0"),
    ]
    assert all(line["severity"] == "error" for line in lines)
    assert lines[0]["origin"] == f"{folder / 't.jsonl'}:2" and lines[0]["sentence"] in output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["errors"] == 5 and summary["warnings"] == 0
    assert {"code": "leak", "severity": "error", "count": 1, "sources": {"held/v.jsonl": 1}} in summary["findings"]
    assert summary["sources"][0]["rows"] == 5 and summary["sources"][0]["samples"] == 2
    assert summary["sources"][0]["tokens"]["max"] > 3000 > summary["max_length"]


def test_the_page_escapes_what_the_data_says_and_needs_nothing_else(bad, folder):
    run(bad, "--output", folder / "out")
    page = (folder / "out" / "report.html").read_text()
    assert EVIL not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page and "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert 'class="over"' in page and 'class="limit"' in page


def test_the_number_of_workers_changes_nothing_but_the_time(bad, folder):
    assert run(bad, "--output", folder / "a", "--workers", 0)[0] == 1
    assert run(bad, "--output", folder / "b", "--workers", 2)[0] == 1
    assert (folder / "a" / "findings.jsonl").read_bytes() == (folder / "b" / "findings.jsonl").read_bytes()
    one, two = (json.loads((folder / name / "summary.json").read_text()) for name in ("a", "b"))
    for name in ("workers", "seconds", "samples_per_second"):
        assert one.pop(name) != two.pop(name) or name != "workers"
    assert one == two


def test_trimmed_samples_are_a_warning(write_config, folder):
    train = write(folder / "t.jsonl", [row(0), row(1, answer="red " * 3000)])
    code, output = run(write_config("run", 1, **sections(train, on_overlong="trim")))
    assert code == 0 and "it will be trimmed or left out" in output and "0 errors, 1 warning;" in output


def test_scenes_are_not_checked_and_the_report_says_so(write_config, folder):
    train = write(folder / "t.jsonl", [row(0)])
    data = {"train": [{"path": str(train)}, {"scenes": "new", "task": "vqa"}], "workers": 0}
    code, output = run(write_config("run", 1, data=data))
    assert code == 0 and "not checked, because generated: scenes/new/vqa/train" in output
    page = (folder / "run-data-check" / "report.html").read_text()
    assert "scenes/new/vqa/train" in page
    code, output = run(write_config("run", 1, data={"train": data["train"][1:], "workers": 0}))
    assert code != 0 and "there is no file to check" in output


def test_a_folder_that_cannot_be_is_refused_at_once(write_config, folder):
    train = write(folder / "t.jsonl", [row(0)])
    code, output = run(write_config("run", 1, **sections(train)), "--output", train)
    assert code != 0 and f"{train} cannot be made a folder" in output and "--output" in output


def test_a_system_prompt_counts(write_config, folder):
    train = write(folder / "t.jsonl", [row(n) for n in range(4)])
    lengths = []
    for name, system in (("plain", None), ("prompted", "Answer with one word.")):
        code, _ = run(write_config(name, 1, **sections(train, system=system)), "--output", folder / name)
        assert code == 0
        (source,) = json.loads((folder / name / "summary.json").read_text())["sources"]
        lengths.append(source["tokens"]["max"])
    assert lengths[1] > lengths[0]

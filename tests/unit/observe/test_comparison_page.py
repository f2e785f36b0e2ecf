"""A comparison in words and pictures: complete, escaped, and readable while trials are missing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from io import StringIO

import pytest
from markupsafe import escape
from rich.console import Console

from vlmtune.evaluate.comparison import Comparison, HeldOut, Scores, Step, Trial, compare_trials
from vlmtune.observe.comparison import (
    cells,
    comparison_tables,
    headings,
    markdown,
    metrics_table,
    plot,
    write_comparison_page,
)

HOSTILE = "<script>alert(1)</script>|\"'"
MACHINE = {"device": "cpu", "threads": 1}
SVG = "{http://www.w3.org/2000/svg}"


def trial(arm: str, seed: int, quality: float, seconds: float, peak: int, generated: bool = True) -> Trial:
    values = {"exact_match": quality} if generated else {}
    metrics = {"loss": 1 - quality, "loss/val/vqa": 1 - quality} | {f"val/vqa/{k}": v for k, v in values.items()}
    held_out = Scores(
        metrics, ["val/vqa/exact_match"] if generated else [], [HeldOut("val", "a", "vqa", 1 - quality, 1, values)]
    )
    items = {"weights fp32": 3 << 20, "batch": 10}
    timed = [Step(n, seconds, 4, seconds / 3) for n in range(1, 9)]
    return Trial(arm, seed, None, 1234, 100_000, peak << 20, items, timed, held_out, MACHINE)


BASE = trial("base", 0, 0.1, 1.0, 1).scores


@pytest.fixture
def found() -> Comparison:
    trials = [trial("full", s, 0.8 + s / 100, 2.0, 200) for s in range(2)]
    trials += [trial(HOSTILE, s, 0.7 + s / 5, 1.0 + s / 10, 100) for s in range(2)] + [
        Trial("ia3", 0, f"no room {HOSTILE}")
    ]
    return compare_trials(trials, BASE, ["full", HOSTILE, "ia3", "prefix"], "full")


def printed(*tables) -> str:
    file = StringIO()
    for table in tables:
        Console(file=file, width=160).print(table)
    return file.getvalue()


def test_the_terminal_has_every_method(found):
    out = printed(*comparison_tables(found), metrics_table(found))
    assert "1234 (1.23%)" in out and "failed" in out and "waiting" in out and "0.50 [0.50, 0.50]" in out
    assert "10 %" in out, "the base model's score"
    assert "0.800 │" in out and "0.800*" not in out, "one seed is better, one is worse"


def test_six_methods_fit_into_a_log_file():
    arms = ["full", "lora", "qlora", "adapter", "prefix", "cross_modal"]
    trials = [trial(arm, s, 0.2 + s / 7, 1.0 + n + s, 10_000 + n) for n, arm in enumerate(arms) for s in range(3)]
    found = compare_trials(trials, BASE, arms, "full")
    file = StringIO()
    for table in [*comparison_tables(found), metrics_table(found)]:
        Console(file=file, width=120).print(table)
    assert "…" not in file.getvalue()


def test_a_sure_difference_is_marked():
    trials = [trial(arm, s, q + s / 1000, 1.0, 9) for arm, q in (("full", 0.8), ("lora", 0.5)) for s in range(3)]
    assert "0.501*" in printed(metrics_table(compare_trials(trials, BASE, ["full", "lora"], "full")))


def test_markdown_rows_have_as_many_cells_as_headings(found):
    text = markdown(found, {"full": 2e-4})
    for part in text.split("## ")[1:]:
        table = [line.replace("\\|", "") for line in part.splitlines() if line.startswith("| ")]
        assert len(table) > 3 and len({line.count("|") for line in table}) == 1, part
    assert "| full | 0.0002 |" in text and f"- ia3, seed 0, failed: no room {HOSTILE}" in text
    assert all(f"- {note}" in text for note in found.notes)
    assert all(len(cells(row, None)) == len(headings(found)) for row in found.rows)


def test_the_picture_is_xml_with_a_point_for_every_ratio(found):
    root = ElementTree.fromstring(plot(found))
    assert len(root.findall(f".//{SVG}circle")) == 4 * 2, "memory, speed, score, loss of two methods"
    titles = [node.text for node in root.iter(f"{SVG}text") if node.get("class") == "title"]
    assert titles == [
        "peak memory, of full",
        "speed by CPU time, times full",
        "score, of full",
        "held-out loss, minus full",
    ]
    width, height = (float(root.get(key)) for key in ("width", "height"))
    for node in root.iter(f"{SVG}circle"):
        assert 0 < float(node.get("cx")) < width and 0 < float(node.get("cy")) < height


def test_a_picture_of_nothing_is_still_one():
    assert ElementTree.fromstring(plot(compare_trials([], None, ["full", "lora"], "full"))).tag == f"{SVG}svg"


def test_losses_alone_are_a_comparison_too():
    trials = [trial(arm, s, 0.5, 1.0, 9, False) for arm in ("full", "lora") for s in range(2)]
    found = compare_trials(trials, trial("base", 0, 0.1, 1.0, 1, False).scores, ["full", "lora"], "full")
    assert (
        found.row("lora").score is None
        and "## Score" not in markdown(found, {})
        and "score, of full" not in plot(found)
    )
    assert "0.500" in printed(*comparison_tables(found)) and "val/vqa" in markdown(found, {})


def test_the_page_is_whole_and_escaped(found, tmp_path):
    plans = {arm: [f"language: {HOSTILE}"] for arm in ("full", HOSTILE)}
    path = write_comparison_page(tmp_path / "compare.html", found, HOSTILE, {}, plans, ["prefix-seed0"])
    page = path.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "prefix-seed0" in page and "<svg" in page
    assert "no room" in page and "weights fp32" in page and "3.0" in page
    for note in found.notes:
        assert str(escape(note)) in page

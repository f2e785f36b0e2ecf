"""The report and the token view: complete, escaped, self-contained, and there for a run that is not finished."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlmtune.observe.charts import draw_chart, number_text
from vlmtune.observe.page import write_page
from vlmtune.observe.token_view import TokenView, chips, terminal_table, visible, write_token_view
from vlmtune.types import VlmtuneError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}"
BOX = [4.0, 4.0, 20.0, 12.0]


def png(width: int = 48, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(width: int = 48, height: int = 32) -> str:
    return "data:image/png;base64," + base64.b64encode(png(width, height)).decode()


def train_line(step: int, text: str = "caption") -> dict:
    return {
        "kind": "train",
        "step": step,
        "loss": 3.0 / step,
        "lr": {text: 1e-4, "projector.*": 1e-3},
        "norm": 1.5,
        "tokens_per_second": 12345.0,
        "data_wait": 0.01,
        "loss_by_task": {text: 2.0 / step},
        "seconds": 0.5 * step,
    }


def eval_line(step: int, text: str = "caption") -> dict:
    return {"kind": "eval", "step": step, "metrics": {f"held-out/{text}": {"f1": 0.1 * step}}, "loss": {text: 1 / step}}


def write_history(folder: Path, lines: list[dict], torn: str = "") -> None:
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """A finished run in which every string a user can influence is an attack."""
    run = tmp_path / "my <b>run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures/a.png").write_bytes(png())
    (run / "config.yaml").write_text(f"prompt: {HOSTILE}\n")
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "host": HOSTILE}))
    row = {"part": HOSTILE, "rule": HOSTILE, "method": "lora", "tensors": 12, "parameters": 34567, "trainable": 1200}
    frozen = row | {"part": "vision", "method": "frozen", "trainable": 0, "lr": None, "weight_decay": None}
    assignment = [row | {"lr": 2e-4, "weight_decay": 0.0, "examples": [HOSTILE]}, frozen | {"examples": []}]
    (run / "assignment.json").write_text(json.dumps(assignment))
    finding = {"level": "warn", "what": HOSTILE, "evidence": HOSTILE, "remedy": HOSTILE}
    said = {"kind": "samples", "step": 3, "answers": [{"reply": HOSTILE, "boxes": [BOX]}, None]}
    lines = [train_line(step, HOSTILE) for step in range(1, 6)]
    write_history(run, [*lines, eval_line(5, HOSTILE), said, {"kind": "finding", "step": 4, **finding}])
    (run / "start.json").write_text(json.dumps([finding, finding | {"level": "pass"}]))
    (run / "memory.json").write_text(json.dumps({"predicted": 2**20, "measured": 2**21, "items": {HOSTILE: 2**20}}))
    summary = {
        "metrics": {f"held-out/{HOSTILE}": {HOSTILE: {"before": 0.125, "after": 0.875}, "loss": {"before": 1.0}}},
        "train_seconds": 75.2,
        "steps": 1234,
        "samples_per_second": 17.5,
        "peak_memory_bytes": 3 * 2**30,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    words = {key: HOSTILE for key in ("group", "task", "question", "reference", "before")} | {"after": HOSTILE + "!"}
    boxes = {"boxes_true": [BOX], "boxes_before": [], "boxes_after": [BOX, [1, 1, 1, 1]], "width": 48, "height": 32}
    images = ["pictures/a.png", data_uri(), "https://example.org/a.png", "../outside.png", HOSTILE]
    (tmp_path / "outside.png").write_bytes(png())
    (run / "samples.json").write_text(json.dumps([{"image": image} | words | boxes for image in images]))
    return run


class Elements(HTMLParser):
    """Names, attributes and text of a page as a browser takes them apart; the style sheet is no text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def assert_harmless(html: str) -> Elements:
    """No script, no handler, nothing that could be fetched: not an address, not a relative path."""
    page = Elements(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value.startswith("data:image/") or value.removeprefix("#") in ids, (tag, value[:40])
    for style in re.findall(r"<style>.*?</style>", html, re.DOTALL):
        assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.named("meta")[1]["content"]
    return page


def test_a_hostile_run_renders_escaped_and_self_contained(hostile_run):
    path = write_page(hostile_run)
    assert path == hostile_run / "report.html"
    page = assert_harmless(path.read_text())
    assert HOSTILE in page.text  # shown, as text
    assert "my <b>run" in page.text


def test_the_page_contains_the_figures(hostile_run):
    page = Elements(write_page(hostile_run).read_text())
    figures = ["1,234", "1 min 15 s", "17.5", "3.00 GiB", "0.125", "0.875", "+0.750", "34.6k", "1200", "2e-4", "12.3k"]
    titles = ["Training loss", "Loss by task", "Learning rate", "Gradient norm", "Speed", "Evaluation loss", "step"]
    assert [text for text in figures + titles if text not in page.text] == []
    assert "1 of 1 scores got better" in page.text
    classes = [attributes.get("class") for attributes in page.named("rect")]
    # + 1: the key above the gallery; one more: the answer on the way
    assert classes.count("true") == 2 + 1 + 1 and classes.count("after") == 4 + 1 + 1
    assert len(page.named("image")) == 2  # the file and the data URI; nothing outside of the run folder
    assert page.text.count("picture not in the run folder") == 3


def test_a_loss_that_falls_is_better_and_a_score_that_falls_is_worse(tmp_path):
    metrics = {"held/chat": {"loss": {"before": 2.0, "after": 1.0}, "f1": {"before": 0.5, "after": 0.4}}}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics}))
    html = write_page(tmp_path).read_text()
    assert re.findall(r'pill (\w+)">([^<]+)<', html) == [("better", "−1.000"), ("worse", "−0.100")]


def test_a_metric_beyond_one_has_a_chart_of_its_own(tmp_path):
    values = {"held/caption": {"f1": 0.5, "cider": 8.0}}
    write_history(tmp_path, [{"kind": "eval", "step": step, "metrics": values} for step in (1, 2)])
    page = write_page(tmp_path).read_text()
    titles = re.findall("<figcaption><h3>([^<]*)", page)
    assert titles == ["caption", "caption cider"], "f1 is not flattened"


def test_an_answer_never_asked_for_is_not_shown_as_silence(tmp_path):
    sample = {"image": data_uri(), "width": 48, "height": 32, "question": "What?", "reference": "red", "after": ""}
    (tmp_path / "samples.json").write_text(json.dumps([sample | {"before": None}]))
    page = Elements(write_page(tmp_path).read_text())
    assert page.text.count("no answer") == 1 and len(page.named("dt")) == 2


def test_a_run_in_progress_renders(tmp_path):
    assert "not finished" in write_page(tmp_path).read_text()  # nothing written yet
    lines = [train_line(step) for step in range(1, 4)]
    write_history(tmp_path, lines, torn='{"kind": "train", "st')
    page = assert_harmless(write_page(tmp_path).read_text())
    assert "Training loss" in page.text and "not finished" in page.text and "1.5 s" in page.text
    assert "1 unreadable line of history.jsonl skipped" in page.text


def test_findings_before_and_during_the_run_stand_together(hostile_run):
    page = Elements(write_page(hostile_run).read_text())
    assert "1 check before the first step passed" in page.text
    assert "What was noticed before the first step and while the run went on." in page.text
    pills = [a["class"] for a in page.named("span") if a.get("class", "").startswith("pill ")]
    assert [p for p in pills if p in ("pill warn", "pill pass", "pill fail")] == ["pill warn"] * 2 + ["pill pass"]


def test_what_was_measured_afterwards_is_shown(tmp_path):
    finding = {"section": "yes_no", "level": "warn", "what": HOSTILE, "evidence": HOSTILE, "remedy": ""}
    record = {"checkpoint": HOSTILE, "base": HOSTILE, "findings": [finding, finding | {"level": "pass"}]}
    (tmp_path / "validate.json").write_text(json.dumps(record))
    cell = {"before": {"value": 0.25}, "after": {"value": 0.75, "low": 0.5, "high": 0.875}}
    levels = {HOSTILE: {"rows": {"probe_of_vision": cell}}, "scene": {"rows": {"probe_of_vision": cell}}}
    (tmp_path / "align.json").write_text(json.dumps({"checkpoint": HOSTILE, "levels": levels}))
    page = assert_harmless(write_page(tmp_path).read_text())
    assert "yes no" in page.text and "1 passed" in page.text
    assert "probe of vision" in page.text and page.text.count("0.25 → 0.75 0.50–0.88") == 2


def test_what_sampling_shifted_to_and_its_suspects(tmp_path):
    told = [{}, {"difficulty": {HOSTILE: 2.0, "vqa": 1.0}, "known": {"vqa": 0.25}, "forgotten": {"vqa": 0.0},
             "hardest": 0.1, "suspects": 0},
            {"difficulty": {HOSTILE: 1.5, "vqa": 0.5}, "known": {HOSTILE: 0.5, "vqa": 0.75}, "hardest": 0.42,
             "forgotten": {"vqa": 0.125}, "suspects": 22}]  # fmt: skip
    shares = [(0.5, 0.5), (0.6, 0.4), (0.75, 0.25)]
    write_history(
        tmp_path,
        [train_line(step) | {"sampling": now, "task_shares": {HOSTILE: hard, "vqa": easy}}
         for step, (now, (hard, easy)) in enumerate(zip(told, shares, strict=True), 1)],
    )  # fmt: skip
    html = write_page(tmp_path).read_text(encoding="utf-8")
    assert_harmless(html)
    assert "42 % of what was drawn last" in html and "50.0% → <b>75.0%</b>" in html and "2 → <b>1.5</b>" in html
    assert "50% → <b>50%</b>" in html and "0.00 → <b>0.12</b>" in html and "25% → <b>75%</b>" in html, (
        "known, first and last that were told"
    )
    assert "22 so far; they are listed when the run ends" in html
    row = {"source": HOSTILE, "origin": "a:1", "task": "vqa", "seen": 4, "first_loss": 5.0, "last_loss": 4.5}
    lines = [json.dumps(row | {"id": f"{HOSTILE}{n}", "row": n}) for n in range(22)]
    (tmp_path / "suspects.jsonl").write_text("\n".join(lines) + "\n")
    html = write_page(tmp_path).read_text(encoding="utf-8")
    assert_harmless(html)
    assert "The worst 20 of 22" in html and html.count("5.00 → <b>4.50</b>") == 20
    (tmp_path / "suspects.jsonl").write_text("{torn")
    with pytest.raises(VlmtuneError, match=r"suspects\.jsonl is not JSON"):
        write_page(tmp_path)


def test_nothing_noticed_is_said(tmp_path):
    (tmp_path / "start.json").write_text(json.dumps([{"level": "pass", "what": "a", "evidence": "b", "remedy": ""}]))
    assert "Nothing was noticed yet." in Elements(write_page(tmp_path).read_text()).text
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3}))
    assert "Nothing was noticed." in Elements(write_page(tmp_path).read_text()).text


def test_memory_is_predicted_and_measured(tmp_path):
    items = {"weights": 30 * 2**20, "activations language": 90 * 2**20, "loss": 44}
    record = {"predicted": 120 * 2**20, "measured": 150 * 2**20, "at": "backward/loss", "items": items}
    (tmp_path / "memory.json").write_text(json.dumps(record))
    page = Elements(write_page(tmp_path).read_text())
    assert "before training 120 MiB, measured in the first step 150 MiB (+25%)" in page.text
    rows = [a["width"] for a in page.named("rect")]
    assert rows == ["75.00", "25.00"], "the largest first; what is less than a tenth of a MiB is left out"
    (tmp_path / "memory.json").write_text(json.dumps({"measured": None, "predicted": None}))
    assert "before training –, measured in the first step –." in Elements(write_page(tmp_path).read_text()).text


def test_a_run_in_progress_says_how_far_it_is(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"steps": 12, "packages": {"torch": "2.13"}}))
    write_history(tmp_path, [train_line(step) for step in range(1, 4)])
    page = Elements(write_page(tmp_path).read_text())
    assert "3 of 12" in page.text and "4.5 s" in page.text and "left, about" in page.text and "torch 2.13" in page.text
    assert [a["aria-valuenow"] for a in page.named("div") if a.get("role") == "progressbar"] == ["25"]
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 12}))
    page = Elements(write_page(tmp_path).read_text())
    assert "left, about" not in page.text and not [a for a in page.named("div") if a.get("role")]


def test_answers_on_the_way_are_shown_in_order_and_the_newest_stands_for_after(tmp_path):
    sample = {"image": data_uri(), "width": 48, "height": 32, "question": "What?", "reference": "red", "before": "blue"}
    (tmp_path / "samples.json").write_text(json.dumps([sample | {"after": None}]))
    said = [{"kind": "samples", "step": 10 * n, "answers": [{"reply": f"said {n}", "boxes": []}]} for n in range(1, 21)]
    write_history(tmp_path, said)
    page = Elements(write_page(tmp_path).read_text())
    assert page.text.index("step 200") < page.text.index("8 answers on the way")
    steps = re.findall(r"step (\d+)\s*said", page.text)
    assert len(steps) == 9 and steps[0] == "200" and steps[1:] == sorted(steps[1:], key=int)
    (tmp_path / "samples.json").write_text(json.dumps([sample | {"after": "red"}]))
    write_history(tmp_path, said[:2])
    text = Elements(write_page(tmp_path).read_text()).text
    assert "2 answers on the way" in text and "red ✓" in text


def test_after_a_resume_the_later_entry_of_a_step_counts(tmp_path):
    write_history(tmp_path, [train_line(1), train_line(2) | {"loss": 99.0}, train_line(2) | {"loss": 0.25}])
    page = Elements(write_page(tmp_path).read_text())
    assert "0.25" in page.text and "99" not in page.text


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(VlmtuneError, match="summary.json is not JSON"):
        write_page(tmp_path)
    with pytest.raises(VlmtuneError, match="not a run folder"):
        write_page(tmp_path / "nowhere")


def test_a_long_run_stays_small(tmp_path):
    write_history(tmp_path, [train_line(step) for step in range(1, 20_001)])
    html = write_page(tmp_path).read_text()
    assert len(html) < 100_000
    assert "mean of 112 steps" in html


def test_the_legend_names_the_last_value_and_scores_share_an_axis():
    points = [(step, step / 1000) for step in range(1, 501)]
    chart = draw_chart("f1", "score", {"held-out": points}, scores=True)
    assert chart.lines[0].last == "0.5"  # not the mean of the last few steps, which is what is drawn
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]


def test_charts_leave_gaps_for_what_is_missing():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, None), (5, math.inf), (6, 1.0), (7, None), (8, 2.0), (9, 1.0)]
    (line,) = draw_chart("loss", "", {"loss": points}).lines
    assert len(line.paths) == 2 and len(line.dots) == 1
    assert draw_chart("loss", "", {"loss": [(1, math.nan)]}) is None
    assert draw_chart("loss", "", {}) is None


@pytest.mark.parametrize(
    "points", [[(5, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -3.0), (2, 1e-9)], [(1, 1e12), (2, 1e-12)], [(0, 5.0), (1, 5.0)]]
)
def test_charts_of_odd_values_stay_inside_the_frame(points):
    chart = draw_chart("t", "u", {"a": points})
    numbers = [float(n) for line in chart.lines for path in line.paths for n in re.findall(r"[\d.]+", path)]
    assert all(0 <= number <= 380 for number in numbers)
    assert all(10 <= tick.position <= 178 for tick in chart.y_ticks)
    assert chart.x_ticks and len(chart.y_ticks) >= 2


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (1234, "1234"), (12345, "12.3k"), (2.5e6, "2.5M")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def view(**changes) -> TokenView:
    pieces = ["<|im_start|>", "user\n", "<|vision_start|>", *["<|image_pad|>"] * 36, "<|vision_end|>", "What?", " red"]
    kinds = ["SPECIAL", "SPECIAL", *["IMAGE"] * 38, "INSTRUCTION", "RESPONSE"]
    ids = [1, 2, 3, *[4] * 36, 5, 6, 7]
    turns = [-1, -1, *[0] * 39, 1]
    weights = [0.0] * 41 + [1.0]
    values = {"sample_id": HOSTILE, "task": HOSTILE, "pieces": pieces, "ids": ids, "kinds": kinds, "turns": turns}
    values |= {"weights": weights, "images": [data_uri()], "boxes": [[tuple(BOX)]], "notes": [HOSTILE]}
    return TokenView(**(values | changes))


def test_the_token_view_is_escaped_and_complete(tmp_path):
    hostile = view(pieces=[HOSTILE, "\x1b[31m\ud800", *view().pieces[2:]])
    path = write_token_view(tmp_path / "new" / "tokens.html", [hostile, view(images=[], boxes=[])])
    page = assert_harmless(path.read_text())
    assert HOSTILE in page.text and "image × 36" in page.text and "42 tokens, 1 with loss" in page.text
    titles = [attributes.get("title") for attributes in page.named("span")]
    assert "id 7 · response · weight 1 · turn 1" in titles
    assert "id 1 · special · weight 0 · template" in titles
    assert page.named("svg")[0]["viewbox"] == "0 0 48 32"
    assert {"class": "true", "x": "4.0", "y": "4.0", "width": "16.0", "height": "8.0"} in page.named("rect")


def test_image_runs_collapse_and_their_frame_does_not():
    shown = [chip.shown for chip in chips(view())]
    assert shown == ["<|im_start|>", "user↵", "<|vision_start|>", "image × 36", "<|vision_end|>", "What?", " red"]
    assert sum(chip.count for chip in chips(view())) == 42


def test_the_terminal_table_shows_pieces_as_they_are():
    odd = view(pieces=["[bold red]x[/]", "\x1b[31m\n", *view().pieces[2:]])
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(terminal_table(odd))
    text = console.export_text()
    assert "[bold red]x[/]" in text and "\\x1b[31m↵" in text and "image × 36" in text and "template" in text
    assert "\x1b" not in text


def test_visible_keeps_every_script_and_escapes_control_characters():
    assert visible("héllo 日本\t\n") == "héllo 日本\\t↵"


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one entry per token"):
        view(ids=[1])
    with pytest.raises(ValueError, match="boxes for 1 images"):
        view(images=[])

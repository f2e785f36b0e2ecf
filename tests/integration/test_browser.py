"""The token view and the run page as a browser shows them: needs Chromium or Chrome, skipped where there is none."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmtune.cli import app
from vlmtune.observe.page import write_page
from vlmtune.watch import server_of

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1200,1600",
)  # fmt: skip
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & <b>bold</b>"
BOX = (20, 10, 60, 40)
BOX_COLOUR = (0x1F, 0xAE, 0x5F)  # --true of the style sheet

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def browse(page: Path, profile: Path, *arguments: str) -> str:
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


class Facts(HTMLParser):
    """What stands in the document after the browser has read it."""

    def __init__(self, html: str):
        super().__init__()
        self.title, self.tokens, self.tags, self._in = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "span" and attributes.get("class", "").startswith("token"):
            self.tokens.append([attributes["class"].split()[1], attributes["title"], ""])
        if tag not in ("img", "br", "wbr", "meta", "rect", "image", "line"):
            self._in.append((tag, attributes.get("class", "")))

    def handle_endtag(self, tag):
        if self._in and self._in[-1][0] == tag:
            self._in.pop()

    def handle_data(self, data):
        if self._in and self._in[-1][0] == "title" and not self.title:
            self.title = data
        if self._in and self._in[-1][1].startswith("token"):
            self.tokens[-1][2] += data


@pytest.fixture
def page(write_config, tmp_path: Path, tiny_folder) -> Path:
    """`vlmtune inspect` of a conversation with hostile text, a box and a reply that was cut."""
    file = io.BytesIO()
    Image.new("RGB", (80, 60), "white").save(file, "PNG")
    (tmp_path / "0.png").write_bytes(file.getvalue())
    reply = [{"type": "box", "boxes": [BOX]}, {"type": "text", "text": "a red circle. " * 60}]
    question = [{"type": "image", "image": "0.png"}, {"type": "text", "text": HOSTILE}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "<i>s</i>", "messages": messages}) + "\n")
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "workers": 0, "max_length": 350, "on_overlong": "trim"}
    config = write_config("run", 3, data=data, model=str(tiny_folder("qwen2_5_vl")))
    path = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(config), "--html", str(path)])
    assert result.exit_code == 0, result.output
    return path


def test_the_page_shows_what_the_command_encoded(page, tmp_path):
    facts = Facts(browse(page, tmp_path / "profile", "--dump-dom"))
    assert facts.title == "What the model sees · vlmtune"
    assert not [tag for tag, _ in facts.tags if tag in ("script", "img")]
    assert not [a for _, a in facts.tags if any(str(a.get(k, "")).startswith("http") for k in ("src", "href"))]
    instruction = "".join(text for kind, _, text in facts.tokens if kind == "instruction")
    assert instruction.replace("↵", "\n").replace(" ", "") == HOSTILE.replace(" ", "")
    supervised = [title for kind, title, _ in facts.tokens if kind in ("response", "box")]
    assert supervised and all("weight 1" in title for title in supervised)
    assert all("weight 0" in title for kind, title, _ in facts.tokens if kind not in ("response", "box"))
    assert facts.tokens[-2][0] == "untrained" or facts.tokens[-1][0] == "untrained"  # the reply was cut
    classes = [attributes.get("class") for tag, attributes in facts.tags if tag in ("rect", "line")]
    assert classes.count("true") == 1 and "over" in classes and "limit" in classes


def test_the_box_is_drawn_where_it_is(page, tmp_path):
    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - BOX_COLOUR) < 3).all(axis=2))
    drawn = (columns.max() - columns.min()) / (rows.max() - rows.min())
    (canvas,) = (a["viewbox"].split() for _, a in Facts(page.read_text()).tags if a.get("class") == "picture")
    shares = (BOX[2] - BOX[0]) / 80, (BOX[3] - BOX[1]) / 60
    assert drawn == pytest.approx(shares[0] * int(canvas[2]) / (shares[1] * int(canvas[3])), rel=0.05)


# ---- the run page --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in progress whose names, questions and replies are attacks, with answers on the way."""
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    (folder / "assignment.json").write_text("[]")
    Image.new("RGB", (80, 60), "white").save(folder / "images/000.png")
    words = {"group": HOSTILE, "task": "vqa", "question": HOSTILE, "reference": "red", "before": HOSTILE, "after": None}
    boxes = {"boxes_true": [BOX], "boxes_before": [], "width": 80, "height": 60}
    (folder / "samples.json").write_text(json.dumps([{"image": "images/000.png"} | words | boxes]))
    start = [{"level": "pass", "what": HOSTILE, "evidence": HOSTILE, "remedy": ""}]
    (folder / "start.json").write_text(json.dumps(start))
    lines = [
        *({"kind": "train", "step": n, "loss": 3.0 / n, "loss_by_task": {HOSTILE: 1.0 / n}} for n in range(1, 30)),
        *({"kind": "samples", "step": n, "answers": [{"reply": HOSTILE, "boxes": [BOX]}]} for n in (10, 20)),
        {"kind": "finding", "step": 9, "level": "fail", "what": HOSTILE, "evidence": "word " * 60, "remedy": HOSTILE},
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_run_page_is_what_the_browser_reads(run, tmp_path):
    facts = Facts(browse(write_page(run), tmp_path / "profile", "--dump-dom"))
    assert facts.title == "run · vlmtune"
    assert not [tag for tag, _ in facts.tags if tag in ("script", "img")]
    sections = [a["id"] for tag, a in facts.tags if tag == "section"]
    assert sections == ["findings", "pictures", "curves"]
    links = [a["href"] for tag, a in facts.tags if tag == "a"]
    assert links == [f"#{name}" for name in sections]
    assert [a["href"] for tag, a in facts.tags if tag == "use"] == ["#picture-1"]


def test_the_run_page_fits_a_phone(run, tmp_path):
    """Nothing is wider than the window: measured by the browser, in a frame as wide as a phone."""
    write_page(run)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{(run / "report.html").as_uri()}" width="360" height="800"></iframe><pre id="o"></pre>'
        "<script>f.onload = () => { const d = f.contentDocument.documentElement;"
        'o.textContent = "wide " + d.scrollWidth + " of " + d.clientWidth; }</script>'
    )
    dom = browse(
        frame, tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=3000"
    )
    wide, window = (int(n) for n in re.search(r"wide (\d+) of (\d+)", dom).groups())
    assert wide <= window


def test_a_served_page_refreshes_itself_and_keeps_what_was_unfolded(run, tmp_path, monkeypatch):
    """The script of `vlmtune watch` runs in the browser under the page's own policy: after a while the page has what
    was written after it was opened."""
    monkeypatch.setattr("vlmtune.watch.SECONDS", 0.2)
    with server_of(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = []
        answer = server.RequestHandlerClass._send

        def send(handler, status, html):
            asked.append(handler.path)
            if len(asked) == 1:  # somebody unfolds this before the next look
                html = html.replace('<details class="passed"', '<details open class="passed"')
            if len(asked) == 2:
                with (run / "history.jsonl").open("a") as file:
                    late = {
                        "kind": "finding",
                        "step": 29,
                        "level": "warn",
                        "what": "it came late",
                        "evidence": "",
                        "remedy": "",
                    }
                    file.write(json.dumps(late) + "\n")
            return answer(handler, status, html)

        monkeypatch.setattr(server.RequestHandlerClass, "_send", send)
        address = f"http://localhost:{server.server_address[1]}/"
        command = [
            BROWSER,
            *QUIET,
            f"--user-data-dir={tmp_path / 'p'}",
            "--virtual-time-budget=4000",
            "--dump-dom",
            address,
        ]
        dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        server.shutdown()
    assert asked.count("/") >= 3 and "it came late" in dom
    assert [("open" in a) for tag, a in Facts(dom).tags if tag == "details"] == [True, False]
    assert "owned" not in Facts(dom).title

"""The token view as a browser shows it: needs Chromium or Chrome, and is skipped where there is none."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmtune.cli import app

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

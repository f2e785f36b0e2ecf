"""`vlmtune align`: the matrix of real runs on scenes and on rows of one's own, and what it refuses (SPEC A7)."""

from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image
from training_setup import PLAN

ROWS = ["vision", "projector", "generated", "by probability"]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
HOSTILE = '<script>alert("1")</script>'


def picture(colour: tuple[int, int, int], number: int) -> bytes:
    """56x56, no two alike."""
    image = Image.new("RGB", (56, 56), colour)
    image.putpixel((number % 56, number // 56), (0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def coloured(tmp_path):
    """held.jsonl: 120 pictures of one colour, an attribute; 30 without a level, 12 of another, 3 without a picture."""
    lines = []
    for n in range(165):
        colour = list(COLOURS)[n % 3]
        (tmp_path / f"{n}.png").write_bytes(picture(COLOURS[colour], n))
        content = [{"type": "image", "image": f"{n}.png"}, {"type": "text", "text": f"what color is it {HOSTILE}"}]
        meta = {"level": "attribute"} if n < 120 else {} if n < 150 else {"level": "relation"}
        lines.append(
            {
                "id": f"c{n}", "task": "colour", "meta": meta,
                "messages": [
                    {"role": "user", "content": content[n >= 162 :]}, {"role": "assistant", "content": colour}
                ],
            }
        )  # fmt: skip
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_scenes_before_and_after(write_config, vlmtune, tmp_path):
    """A frozen tower, a projector that trains: one row is the same, and said to be; all figures agree everywhere."""
    assert vlmtune("train", write_config("run", 4))[0] == 0
    run = tmp_path / "run"
    code, out, err = vlmtune("align", run, "--samples", 20, "--concepts", "base")
    assert (code, err) == (0, "")
    record = json.loads((run / "align.json").read_text())
    assert list(record["levels"]) == ["object", "attribute", "relation", "scene"] and record["frozen"] == ["vision"]
    assert "vision (frozen: the same)" in out and f"page: {run / 'align.html'}" in out.replace("\n", "")
    for found in record["levels"].values():
        assert (found["test"], found["learn"]) == (20, 60) and list(found["rows"]) == ROWS
        assert found["rows"]["vision"]["before"] == found["rows"]["vision"]["after"]
        assert found["rows"]["vision"]["change"]["value"] == 0
        assert sum(q["test"] for q in found["questions"]) == 20
        for row in ROWS:
            after = found["rows"][row]["after"]
            share = sum(q["test"] * q["after"][row] for q in found["questions"]) / 20
            assert after["value"] == pytest.approx(share) and after["low"] <= after["value"] <= after["high"]
        # a random language model of 4 layers says no name, and it has never been taught one
        assert found["rows"]["generated"]["after"]["value"] < 0.5 and found["unlisted"]["after"] > 10
    assert {finding["matrix_level"] for finding in record["findings"]} == set(record["levels"])
    assert '<section id="alignment">' in (run / "report.html").read_text()
    html = (run / "align.html").read_text()
    assert "Which photo?" in html and "<script" not in html and "http://" not in html


def test_rows_of_ones_own(write_config, vlmtune, tmp_path, coloured):
    """Colours, which even a random tower shows; the answers are the closed set that the rows themselves make."""
    source = {"path": str(coloured)}
    plan = [{"match": "vision", "train": "full"}, *PLAN[1:]]
    config = write_config(
        "run", 40, plan=plan, data={"train": [source], "eval": {"held": [source]}, "workers": 0},
        train={"length": 40, "batch_size": 8, "micro_batch_size": 8, "precision": "fp32", "log_every": 20},
        checkpoint={"every": 40}, evaluate={"generate": False, "max_new_tokens": 6},
    )  # fmt: skip
    assert vlmtune("train", config)[0] == 0
    run = tmp_path / "run"
    code, out, err = vlmtune("align", run, "--on", "data", "--samples", 30)
    assert (code, err) == (0, "")
    record = json.loads((run / "align.json").read_text())
    assert list(record["levels"]) == ["attribute"] and record["frozen"] == []
    found = record["levels"]["attribute"]
    assert (found["test"], found["learn"]) == (30, 90)
    assert found["rows"]["vision"]["after"]["value"] == 1.0, "one colour per picture is linear in any features"
    assert found["rows"]["generated"]["before"]["value"] == 0.0 and found["unlisted"]["before"] == 30
    assert found["rows"]["by probability"]["after"]["value"] >= found["rows"]["by probability"]["before"]["value"]
    assert record["left_out"] == {"without a level": 30, "not with exactly one image": 3}
    assert "12 questions with a closed set of answers; at least 80" in record["too_few"]["relation"]
    assert "left out: 30 rows without a level" in out and "relation: not measured" in out
    html = (run / "align.html").read_text()
    assert HOSTILE not in html and "&lt;script&gt;alert(&#34;1&#34;)" in html

    code, out, _ = vlmtune("align", run, "--on", "data", "--samples", 30, "--level", "colour=scene", "--json")
    record = json.loads(out)
    assert code == 0 and record["levels"]["attribute"] == found, "a row's own level comes first; deterministic"
    assert "30 questions" in record["too_few"]["scene"] and "without a level" not in record["left_out"]


@pytest.mark.slow
def test_a_chain_from_the_first_base_to_the_last_stage(chain, vlmtune, tmp_path):
    """Its middle stage trains everything but the tower: against the base of the last stage nothing would show."""
    assert vlmtune("train", chain("chain"))[0] == 0
    code, _, err = vlmtune("align", tmp_path / "chain", "--samples", 20)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "chain" / "align.json").read_text())
    assert record["frozen"] == ["vision"] and (tmp_path / "chain" / "align.html").is_file()


def test_what_is_refused(write_config, vlmtune, tmp_path):
    assert vlmtune("train", write_config("run", 4))[0] == 0
    for options, message in (
        (["--samples", 5], "--samples 5: at least 20"),
        (["--level", "vqa=object"], "add --on data"),
        (["--on", "data", "--concepts", "new"], "--concepts is about the embedded scenes"),
        (["--on", "data", "--level", "vqa=colour"], "write task=level, the level one of object, attribute"),
        (["--on", "data"], "has no data.eval"),
        (["--checkpoint", "best"], "no checkpoint 'best'"),
    ):
        code, _, err = vlmtune("align", tmp_path / "run", *options)
        assert code == 1 and message in " ".join(err.split()), err
        assert not (tmp_path / "run" / "align.json").exists()


def test_data_that_nothing_can_be_measured_on(write_config, vlmtune, tmp_path, rows, coloured):
    data = {"train": [{"path": str(rows)}], "eval": {"held": [{"path": str(rows)}]}, "workers": 0}
    assert vlmtune("train", write_config("run", 4, data=data, evaluate={"generate": False}))[0] == 0
    code, _, err = vlmtune("align", tmp_path / "run", "--on", "data")
    assert code == 1 and re.search(
        r"no level can be measured.*12 rows without a level.*meta.choices", " ".join(err.split())
    )
    code, _, err = vlmtune("align", tmp_path, "--on", "data")
    assert code == 1 and "is not a run folder" in err

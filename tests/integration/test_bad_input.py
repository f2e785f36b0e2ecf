"""What a user gets wrong, through the real command line: exit code 1, one sentence, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vlmtune import cli


def png() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def good_row(number: int) -> dict:
    picture, question = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is there?"}
    reply = {"role": "assistant", "content": f"a red circle {number}"}
    return {"id": f"row-{number}", "messages": [{"role": "user", "content": [picture, question]}, reply]}


@dataclass
class Project:
    """A folder with a data set of four good rows and a config of four steps on a tiny LLaVA."""

    folder: Path
    model: Path

    def __post_init__(self) -> None:
        (self.folder / "a.png").write_bytes(png())
        self.rows = [good_row(number) for number in range(4)]
        self.tree = {
            "model": str(self.model),
            "run": str(self.folder / "run"),
            "data": {"train": [{"path": str(self.folder / "train.jsonl")}], "workers": 0},
            "plan": [
                {"match": "vision", "train": "frozen"},
                {"match": "projector", "train": "full"},
                {"match": "language", "train": "lora", "rank": 2},
                {"match": "*", "train": "frozen"},
            ],
            "optim": {"warmup": 0},
            "train": {"length": "2 steps", "batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
        }

    @property
    def run(self) -> Path:
        return Path(self.tree["run"])

    @property
    def config(self) -> Path:
        (self.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.tree))
        return path

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


@pytest.fixture
def project(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Project:
    return Project(tmp_path, tiny_folder("llava"))


@pytest.fixture
def vlmtune(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmtune", *map(str, arguments)])
        capfd.readouterr()
        monkeypatch.setattr(cli.console, "_file", None)
        try:
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        else:
            code = 0
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


def assert_one_sentence(code: int, err: str, *expected: str) -> None:
    assert code == 1, err
    assert err.startswith("error: "), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, f"more than one line:\n{err}"
    assert "Traceback" not in err
    assert err.rstrip().endswith((".", "?")), err
    for text in expected:
        assert text in err, err


def test_the_project_itself_is_good(project, vlmtune):
    """What every test below changes one thing of."""
    code, _, err = vlmtune("train", project.config)
    assert (code, err) == (0, "")
    assert json.loads((project.run / "summary.json").read_text())["steps"] == 2


# ---- refused before anything is written -------------------------------------------------------------------------


def _misspelled(p: Project):
    p.tree["optim"]["lernrate"] = 1
    p.tree["trian"] = {}
    return "unknown key optim.lernrate", "unknown key trian (did you mean train?)"


def _warmup(p: Project):
    p.tree["optim"]["warmup"] = "5 steps"
    return "optim.warmup is 5 steps, but the run has only 2; shorten it"


def _no_processor(p: Project):
    folder = p.folder / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).symlink_to(p.model / name)
    p.tree["model"] = str(folder)
    return f"no processor in '{folder}'", "preprocessor_config.json", "copy them from the base model's folder"


def _no_model(p: Project):
    p.tree["model"] = "/no/model"
    return "model folder '/no/model' does not exist"


def _no_data(p: Project):
    p.tree["data"]["train"][0]["path"] = str(p.folder / "none.jsonl")
    return f"data file {p.folder}/none.jsonl does not exist"


def _no_image_root(p: Project):
    p.tree["data"]["train"][0]["image_root"] = str(p.folder / "none")
    return f"image_root {p.folder}/none"


def _below_a_file(p: Project):
    p.tree["run"] = str(p.folder / "a.png" / "run")
    return f"run folder {p.folder}/a.png/run cannot be written", "set run="


def _rule_covers_nothing(p: Project):
    p.tree["plan"].insert(0, {"match": "visoin", "train": "frozen"})
    return "rule 'visoin' covers nothing (did you mean 'vision'?)"


def _parameter_without_rule(p: Project):
    del p.tree["plan"][-1]
    return "no rule covers "


def _all_frozen(p: Project):
    p.tree["plan"] = [{"match": "*", "train": "frozen"}]
    return "every rule says frozen, so nothing would train", "train: full or lora"


def _rank_too_high(p: Project):
    p.tree["plan"][2]["rank"] = 1000
    return "rank 1000 exceeds", "lower the rank"


def _endless_eval(p: Project):
    p.tree["data"]["eval"] = {"held": [{"scenes": "base", "task": "vqa"}]}
    return "data.eval.held: ", "give it a limit"


def _weights(p: Project):
    p.tree["data"]["train"][0]["weight"] = 0
    return "data.train: weights at 0% of training are [0.0]"


def _coordinates(p: Project):
    p.tree["data"]["coordinates"] = "norm100"
    return "Unknown coordinate convention 'norm100'; did you mean 'norm1000'?"


EARLY = [_misspelled, _warmup, _no_processor, _no_model, _no_data, _no_image_root, _below_a_file, _rule_covers_nothing,
         _parameter_without_rule, _all_frozen, _rank_too_high, _endless_eval, _weights, _coordinates]  # fmt: skip


@pytest.mark.parametrize("spoil", EARLY)
def test_refused_before_anything_is_written(project, vlmtune, spoil):
    expected = spoil(project)
    config = project.config
    before = project.files()
    code, _, err = vlmtune("train", config)
    assert_one_sentence(code, err, *([expected] if isinstance(expected, str) else expected))
    assert project.files() == before, "something was written"
    assert not project.run.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("embeded_base", "Did you mean embedded_base?"), ("none.yaml", "config none.yaml does not exist")],
)
def test_an_unknown_recipe(vlmtune, name, expected):
    code, _, err = vlmtune("train", name)
    assert_one_sentence(code, err, expected)


def test_a_wrong_override(project, vlmtune):
    code, _, err = vlmtune("train", project.config, "optim.lr=quick", "plan.2.rnk=3")
    assert_one_sentence(code, err, "optim.lr", "unknown key plan.2.rnk (did you mean rank?)")


# ---- bad rows ---------------------------------------------------------------------------------------------------


def _missing_image(p: Project, row: dict):
    row["messages"][0]["content"][0]["image"] = "gone.png"
    return "image gone.png not found; tried ", f"{p.folder}/gone.png"


def _truncated_jpeg(p: Project, row: dict):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(buffer, "JPEG")
    (p.folder / "cut.jpg").write_bytes(buffer.getvalue()[:700])
    row["messages"][0]["content"][0]["image"] = "cut.jpg"
    return f"image {p.folder}/cut.jpg cannot be decoded", "replace or remove it"


def _no_reply(p: Project, row: dict):
    del row["messages"][1]
    return "no assistant text to learn from", "add a reply or remove the row"


def _placeholders(p: Project, row: dict):
    del row["messages"]
    row["conversations"] = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "red"}]
    row["images"] = ["a.png"]
    return "2 <image> marks in user text, but 1 images", "make them equal"


def _too_long(p: Project, row: dict):
    row["messages"][1]["content"] = "red " * 3000
    return "exceed 2,048 tokens", "Raise data.max_length, or set data.on_overlong to trim or drop."


def _box_without_image(p: Project, row: dict):
    row["messages"][1]["content"] = [{"type": "box", "boxes": [[0, 0, 5, 5]], "image": 3}]
    return "a box refers to image 3"


BAD_ROWS = [_missing_image, _truncated_jpeg, _no_reply, _placeholders, _too_long, _box_without_image]


@pytest.mark.parametrize(
    ("spoil", "workers"), [*((spoil, 0) for spoil in BAD_ROWS), (_missing_image, 1), (_too_long, 1)]
)
def test_a_bad_row_stops_the_run_and_is_named(project, vlmtune, spoil, workers):
    """With a worker process too, whose errors arrive as tracebacks by default."""
    expected = spoil(project, project.rows[2])
    project.tree["data"]["workers"] = workers
    project.tree["train"]["length"] = "2 epochs"
    code, _, err = vlmtune("train", project.config)
    assert_one_sentence(code, err, f"{project.folder}/train.jsonl:3 (sample row-2)", *expected)
    assert not (project.run / "summary.json").exists()
    assert not [p for p in project.run.rglob("*") if p.name.startswith(".")], "a draft was left behind"


# ---- a run folder that is in use --------------------------------------------------------------------------------


def test_resuming_with_another_config_is_refused_and_the_run_kept(project, vlmtune):
    assert vlmtune("train", project.config)[0] == 0
    before = project.files()
    code, _, err = vlmtune("train", project.config, "optim.lr=1e-3")
    assert_one_sentence(
        code, err, f"{project.run} holds a run of another config: optim.lr (", " -> 0.001)", "run=", "--restart"
    )
    assert project.files() == before


def test_restart_with_a_bad_config_keeps_the_old_run(project, vlmtune):
    assert vlmtune("train", project.config)[0] == 0
    before = project.files()
    code, _, err = vlmtune("train", project.config, "--restart", "optim.warmup=7 steps")
    assert_one_sentence(code, err, "optim.warmup is 7 steps")
    assert project.files() == before
    code, _, err = vlmtune("train", project.config, "--restart", "optim.lr=1e-3")
    assert (code, err) == (0, "")
    assert yaml.safe_load((project.run / "config.yaml").read_text())["optim"]["lr"] == 1e-3


def test_only_run_folders_are_written_to_or_deleted(project, vlmtune):
    project.run.mkdir()
    (project.run / "thesis.txt").write_text("years of work")
    (project.run / "config.yaml").write_text("written: by hand")
    for flags in ((), ("--restart",)):
        code, _, err = vlmtune("train", project.config, *flags)
        assert_one_sentence(code, err, "is not empty and not a run folder of vlmtune", "run=")
        assert (project.run / "thesis.txt").read_text() == "years of work"
        assert (project.run / "config.yaml").read_text() == "written: by hand"


def test_commands_on_what_is_no_run(project, vlmtune):
    for arguments in (("eval", project.folder), ("export", project.folder, project.folder / "out")):
        code, _, err = vlmtune(*arguments)
        assert_one_sentence(code, err, f"{project.folder} is not a run folder: config.yaml is missing")
    code, _, err = vlmtune("predict", project.folder / "none.png", "What?", "--model", project.model)
    assert_one_sentence(code, err, "none.png does not exist")
    code, _, err = vlmtune("inspect", project.config, "--sample", "row-9", "--html", project.folder / "page.html")
    assert_one_sentence(code, err, "no sample with id 'row-9'")
    assert not (project.folder / "page.html").exists()
    assert not (project.folder / "out").exists()


def test_the_installed_command_says_the_same(tmp_path):
    """As a process of its own: no traceback from the interpreter either."""
    (tmp_path / "c.yaml").write_text("modle: x\n")
    environment = os.environ | {"COLUMNS": "40"}  # a narrow terminal does not break the sentence
    done = subprocess.run(
        [sys.executable, "-m", "vlmtune", "train", "c.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert_one_sentence(done.returncode, done.stderr, "c.yaml: ", "unknown key modle (did you mean model?)")
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["c.yaml"]

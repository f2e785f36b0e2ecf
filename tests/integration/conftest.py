"""A run of the debug size: tiny llava, files on disk, a config that `vlmtune train` takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from training_setup import IN_FULL, PLAN, STAGE_STEPS, write_data

from vlmtune import cli


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """train.jsonl: 12 conversations of unequal length, one without an image."""
    return write_data(tmp_path_factory.mktemp("rows"), 12)


@pytest.fixture
def write_config(tiny_folder, rows, tmp_path) -> Callable[..., Path]:
    """`write_config("name", steps, **sections)`: a config of a run in tmp_path/name; returns the YAML file."""

    def write(name: str, steps: int, **sections) -> Path:
        tree = {
            "model": str(tiny_folder("llava")),
            "run": str(tmp_path / name),
            "data": {"train": [{"path": str(rows)}], "workers": 0},
            "plan": PLAN,
            "optim": {"lr": 1e-2, "warmup": 2},
            "train": {"length": steps, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
            "checkpoint": {"every": 1},
            **sections,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def chain(tiny_folder, rows, tmp_path):
    """`chain("name")` -> the YAML file of a chain of three stages in tmp_path/name."""

    def write(name: str, **top) -> Path:
        source = {"path": str(rows)}
        tree = {
            "model": str(tiny_folder("llava")),
            "run": str(tmp_path / name),
            "data": {"train": [source], "eval": {"val": [source | {"limit": 3}]}, "workers": 0},
            "optim": {"lr": 5e-3, "warmup": 1},
            "train": {"batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
            "checkpoint": {"every": 1},
            "evaluate": {"generate": False},
            "stages": [
                {"name": "align", "plan": IN_FULL, "train": {"length": STAGE_STEPS["align"]}},
                {"name": "tasks", "plan": IN_FULL, "train": {"length": STAGE_STEPS["tasks"]},
                 "data": {"max_length": 256},
                 "loss": {"balance": {"by": "fixed", "weights": {"caption": 0.7, "vqa": 0.3}}}},
                {"name": "instruct", "plan": PLAN, "train": {"length": STAGE_STEPS["instruct"]}},
            ],
            **top,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def quiet():
    """A console that prints nowhere."""
    with open("/dev/null", "w") as nowhere:
        yield Console(file=nowhere)


@pytest.fixture
def vlmtune(monkeypatch, capsys):
    """`vlmtune("train", path)` -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmtune", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setattr(cli.console, "_width", 200)
    return run

"""`vlmtune plan`: what it prints, from a config.json without weights, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from vlmtune.config import parse_config

DATA = {"train": [{"scenes": "base", "task": "caption", "limit": 8}]}
SMALL = ("--tokens", 64, "--max-pixels", 56 * 56, "--device", "cpu")


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A folder with a config.json and nothing else."""
    shutil.copy(tiny_folder("llava") / "config.json", tmp_path / "config.json")
    return tmp_path


def test_the_answer_as_text(model, vlmtune):
    code, out, err = vlmtune("plan", model, "--memory", "900MB", *SMALL)
    assert (code, err) == (0, "")
    for text in ("one optimizer step at its peak", "weights trained", "optimizer", "what was considered", "chosen",
                 "- method: full", "for the config:", "assumed: 64 tokens a sample"):  # fmt: skip
        assert text in out
    tree = yaml.safe_load(out.split("for the config:")[1])
    assert parse_config({"model": "embedded", "data": DATA, **tree}).plan[0].train == "full"


def test_the_answer_as_json(model, vlmtune):
    code, out, _ = vlmtune("plan", model, "--memory", "900MB", "--goal", "memory", "--json", *SMALL)
    answer = json.loads(out)
    assert code == 0 and answer["method"].startswith("QLoRA r8") and answer["gradient_checkpointing"]
    assert sum(answer["items"].values()) == answer["total"] < answer["memory"]
    assert answer["items"]["weights nf4"] > 0 and answer["config"]["quantise"] == {"double": True}
    assert [option["chosen"] for option in answer["options"]].count(True) == 1


def test_what_several_processes_hold_and_send(model, vlmtune):
    code, out, err = vlmtune("plan", model, "--memory", "900MB", "--processes", 2, *SMALL)
    assert (code, err) == (0, "")
    assert "GiB on each of 2 cpu devices" in out and "GiB sent a step" in out
    assert "shard: false" in out, "auto might decide otherwise"
    assert "full, in 2 parts" in out and "processes: each of 2 has the whole model, because it fits" in out


@pytest.mark.slow
def test_a_published_model_by_name(vlmtune):
    code, out, err = vlmtune("plan", "SmolVLM-256M", "--memory", "24GB", "--goal", "memory", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "") and answer["parameters"] == 256_484_928
    assert answer["reserve"] > 10**9 and answer["device"] == "cuda"


def test_the_data_of_a_config_is_measured(write_config, model, vlmtune):
    config = write_config("run", 2)
    code, out, err = vlmtune(
        "plan", model, "--memory", "900MB", "--device", "cpu", "--goal", "memory", "--data", config
    )
    assert (code, err) == (0, "")
    assert "12 samples, half of them up to" in out and "up to 1 image(s) of 56x56 pixels" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--memory", "lots"), "--memory 'lots' is not a size; write a number and a unit"),
        (("--memory", "24"), "is not a size"),
        (("--memory=-3GB",), "is not a size"),
        (("--memory", "0GB"), "is nothing"),
        (("--memory", "1MB", *SMALL), "nothing fits into 0.0 GiB: the smallest plan"),
        (("--memory", "1GB", "--tokens", 0), "--tokens 0 is less than 1"),
        (("--memory", "1GB", "--images", -2), "--images -2 is negative"),
        (("--memory", "1GB", "--tokens", 8), "only"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(model, vlmtune, arguments, complaint):
    code, _, err = vlmtune("plan", model, *arguments)
    assert code == 1 and complaint in err and "Traceback" not in err and err.startswith("error:")


def test_an_unknown_model_names_the_nearest(vlmtune):
    code, _, err = vlmtune("plan", "qwen2.5-vl-8b", "--memory", "24GB")
    assert code == 1 and "did you mean" in err and "qwen2.5-vl-7b" in err


def test_the_embedded_model_has_a_plan(vlmtune):
    """Its tower is no transformer: what comes out of it is what its config says, 36 tokens an image."""
    code, out, err = vlmtune("plan", "embedded", "--memory", "2GB", "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    assert "1 image(s) of 672x672 pixels (36 tokens)" in json.loads(out)["data"]
